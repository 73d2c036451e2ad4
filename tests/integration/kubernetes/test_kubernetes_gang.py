"""Steps on several nodes of a real cluster: the pods of a Job, which are there together or not at all."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.base import DetachedError, RelaunchError
from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.compute.kubernetes import contact, launcher
from airflow_mlpipelines.compute.kubernetes import gang as gangs
from airflow_mlpipelines.compute.kubernetes import pod as pod_module
from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter, remove_pods
from airflow_mlpipelines.compute.kubernetes.detaching import PodWatch
from airflow_mlpipelines.compute.kubernetes.gang import INDEX, plan_gang
from airflow_mlpipelines.compute.kubernetes.pod import label_value, pod_name
from airflow_mlpipelines.compute.kubernetes.scripts import KEEP, KEPT_MINUTES
from airflow_mlpipelines.definition.graph import ResourcesSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from airflow_mlpipelines.runtime.metrics import read_metrics
from tests.gangs import (
    COUNT,
    FAIL_AT_3,
    HOG_AT_1,
    TELL_SECRET,
    WAIT,
    launch_fields,
    make_mpi_image,
)
from tests.integration.kubernetes.gate import Gate
from tests.integration.kubernetes.steps import make_api, suppress_absent, wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import IMAGE, MEBIBYTE, PodStep
from tests.parts import missing
from tests.unit.compute.launcher_contract import Running
from tests.unit.runtime.test_gang import ALL_REDUCE, MPI_REDUCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher

pytestmark = pytest.mark.kubernetes


class Gang(PodStep):
    """One step run on several nodes, and all that there is of it on the cluster."""

    def run_gang(
        self, script: str, launcher: KubernetesLauncher | None = None, **fields: Any
    ) -> list[str]:
        argv, launch = launch_fields(self.stage, self.root, script, **fields)
        return self.run(*argv, launcher=launcher, **launch)

    def begin(
        self, script: str, launcher: KubernetesLauncher | None = None, **fields: Any
    ) -> Running:
        """Run a gang beside the test."""
        gang = self

        class InThread(Running):
            def _run(self, _bench: Any, _arguments: Any, _options: Any) -> None:
                try:
                    gang.run_gang(script, launcher, **fields)
                except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
                    self.error = error

        return InThread(None, (), {})  # type: ignore[arg-type]

    def count(self, text: str) -> int:
        """Return how many lines there are with this text."""
        return sum(text in line for line in self.lines)

    def others(self) -> list[str]:
        """Return what there is besides pods and Secrets."""
        from kubernetes import client

        api = make_api(self.kubeconfig)
        label = f"airflow-mlpipelines.step_run={self.name}"
        jobs = client.BatchV1Api(api.api_client).list_namespaced_job(
            self.namespace, label_selector=label
        )
        services = api.list_namespaced_service(self.namespace, label_selector=label)
        return [f"job {each.metadata.name}" for each in jobs.items] + [
            f"service {each.metadata.name}" for each in services.items
        ]

    def remove_others(self) -> None:
        from kubernetes import client

        api = make_api(self.kubeconfig)
        for kind, name in (each.split() for each in self.others()):
            with suppress_absent():  # a Service goes with its Job
                if kind == "job":
                    client.BatchV1Api(api.api_client).delete_namespaced_job(
                        name, self.namespace, propagation_policy="Background"
                    )
                else:
                    api.delete_namespaced_service(name, self.namespace)

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not self.look.pods(), "the pods are gone")
        assert self.others() == []
        assert self.look.secrets() == []
        assert self.handle.get() is None


@pytest.fixture
def gang(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gang]:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    made = Gang(tmp_path / "step", cluster.kubeconfig, cluster.namespace)
    try:
        yield made
    finally:
        made.remove_others()
        made.look.remove()


def test_pods_find_each_other_and_what_all_of_them_made_arrives(gang: Gang) -> None:
    script = (
        ALL_REDUCE
        + """
    import json, os, pathlib, sys
    sys.path.insert(0, "/mlp/runtime")
    from airflow_mlpipelines import Run
    Run.get_context().log("rank", rank)
    part = pathlib.Path("/mlp/outputs/model")
    part.mkdir(exist_ok=True)
    (part / ("part-%d" % rank)).write_text(str(rank))
    (part / "shared").write_text("of node " + os.environ["NODE_RANK"])
    """
    )
    lines = gang.run_gang(script, nodes=3)

    assert "[rank 0] total 3" in lines
    model = gang.root / "outputs" / "model"
    assert sorted(file.name for file in model.iterdir()) == ["part-0", "part-1", "part-2", "shared"]
    assert (model / "shared").read_text() == "of node 0"
    logs = sorted(file.name for file in (gang.root / "code" / "logs").iterdir())
    assert logs == [f"std_log_process_{rank}.txt" for rank in range(3)]
    assert sorted(read_metrics(gang.stage.run)["rank"]) == [0, 1, 2]
    gang.assert_nothing_left()


def test_a_rank_that_fails_ends_all_and_its_log_is_in_the_error(gang: Gang) -> None:
    with pytest.raises(
        StepFailedError, match=r"node 1 of 2 \(pod .* on .*\): exit code 1"
    ) as caught:
        gang.run_gang(FAIL_AT_3, processes=2)

    assert "  out of data" in caught.value.log_tail
    assert any(line.startswith("rank 3 of 4 ended with") for line in caught.value.log_tail)
    log = gang.root / "code" / "logs" / "std_log_process_3.txt"
    assert log.read_text() == "out of data\n"
    gang.assert_nothing_left()


def test_a_node_without_enough_memory_is_named_with_its_limit(gang: Gang) -> None:
    with pytest.raises(
        StepFailedError, match=r"node 1 of 2 .*killed because it needed more"
    ) as caught:
        gang.run_gang(HOG_AT_1, resources=ResourcesSpec(memory=64 * MEBIBYTE))
    assert not caught.value.retryable
    gang.assert_nothing_left()


def test_a_pod_that_is_taken_away_ends_the_gang_which_is_launched_again(gang: Gang) -> None:
    running = gang.begin(WAIT)
    wait_until(lambda: gang.count("begun") == 2, "both ranks run")
    (name,) = [pod.metadata.name for pod in gang.look.pods() if "-1-" in pod.metadata.name]
    make_api(gang.kubeconfig).delete_namespaced_pod(name, gang.namespace, grace_period_seconds=1)

    with pytest.raises(RelaunchError, match=r"node 1 of 2 .*launched again \(1 of 5\)"):
        running.wait()
    assert gang.handle.get() == {"launcher": "kubernetes", "relaunches": 1}
    gang.handle.set(None)
    gang.assert_nothing_left()


def test_secrets_reach_every_pod_and_are_in_none_of_them(gang: Gang) -> None:
    lines = gang.run_gang(TELL_SECRET, secrets={"PASSWORD": "drowssap"})
    assert sorted(line for line in lines if "secret" in line) == [
        "[rank 0] secret password False",
        "[rank 1] secret password False",
    ]
    gang.assert_nothing_left()


def test_what_a_gang_takes_to_be_made_is_asked_for_until_it_is_there(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(gang.kubeconfig, gang.root / "kubeconfig") as gate:
        monkeypatch.setenv("KUBECONFIG", str(gang.root / "kubeconfig"))
        gate.lose("POST", "/jobs")
        for kind in ("/services", "/secrets"):
            gate.refuse("POST", kind, 429)
            gate.lose("POST", kind)
        gate.refuse("GET", f"/jobs/{gang.look.name}", 503, times=2)
        gang.run_gang("print('on')", nodes=2)
        assert gate.were_used()
    assert gang.count("] on") == 2
    gang.assert_nothing_left()


def test_a_retry_adopts_all_pods_of_a_lost_worker(gang: Gang) -> None:
    import multiprocessing

    worker = multiprocessing.get_context("fork").Process(
        target=gang.run_gang, args=(COUNT,), daemon=True
    )
    worker.start()

    def is_running() -> bool:
        pods = gang.look.pods()
        states = [
            status.state.running
            for pod in pods
            for status in pod.status.container_statuses or ()
            if status.name == "step"
        ]
        return len(states) == 2 and all(states)

    wait_until(is_running, "both pods run")
    worker.kill()
    worker.join()
    before = sorted(pod.metadata.uid for pod in gang.look.pods())

    retry = gang.launcher()
    assert retry.recover(gang.name, gang.handle)
    assert sorted(pod.metadata.uid for pod in gang.look.pods()) == before
    lines = gang.run_gang(COUNT, retry)

    for rank in range(2):
        own = [line for line in lines if line.startswith(f"[rank {rank}]")]
        assert own == [f"[rank {rank}] line {i}" for i in range(40)]
    gang.assert_nothing_left()


def leave_on_lost_node(gang: Gang, *volumes: dict[str, Any]) -> str:
    """Leave a pod of an earlier Job, which is gone, where no kubelet answers; return its name."""
    name = f"{pod_name(gang.name)}-0-{uuid.uuid4().hex[:5]}"
    labels = {STEP_RUN_LABEL: label_value(gang.name), INDEX: "0"}
    container = {"name": "step", "image": IMAGE}
    spec = {"nodeName": "lost", "containers": [container], "volumes": list(volumes)}
    pod = {"metadata": {"name": name, "labels": labels}, "spec": spec}
    api = make_api(gang.kubeconfig)
    api.create_namespaced_pod(gang.namespace, pod)
    api.delete_namespaced_pod(name, gang.namespace, grace_period_seconds=2)
    return name


def test_a_retry_does_not_count_a_pod_that_its_lost_node_keeps(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gangs, "_REMOVAL_SECONDS", 3.0)
    left = leave_on_lost_node(gang)
    assert [pod.metadata.name for pod in gang.look.pods()] == [left]

    lines = gang.run_gang("print('ran')", gang.launcher(schedule_timeout_seconds=40))

    assert {"[rank 0] ran", "[rank 1] ran"} <= set(lines)
    gang.assert_nothing_left()


def test_no_retry_starts_beside_a_pod_that_may_still_write_to_a_shared_volume(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gangs, "_REMOVAL_SECONDS", 3.0)
    claim = {"name": "data", "persistentVolumeClaim": {"claimName": "ml-data"}}
    left = leave_on_lost_node(gang, claim)

    with pytest.raises(ComputeUnavailableError, match=rf"'{left}'.*kubectl delete node"):
        gang.run_gang("print('ran')")

    assert [pod.metadata.name for pod in gang.look.pods()] == [left]
    assert gang.others() == []


def wait_without_worker(watch: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what a trigger finds of pods that were left to themselves, and the lines that it hands on."""
    lines: list[str] = []
    awaiter = PodAwaiter(
        PodWatch.from_dict(watch), lambda _time, line: lines.append(line), token="a trigger"
    )
    news = asyncio.run(asyncio.wait_for(awaiter.wait(), 60))
    return json.loads(json.dumps(news.to_dict())), lines


def leave_running(gang: Gang, script: str) -> dict[str, Any]:
    """Run a gang until its worker leaves it, which it may do sooner where pods start slowly; return the watch."""
    news = None
    while True:
        with pytest.raises(DetachedError) as left:
            gang.run_gang(script, gang.launcher(defer_after_seconds=2), detach=True, news=news)
        watch: dict[str, Any] = left.value.watch
        if watch["awaits"] == "end":
            return watch
        news, lines = wait_without_worker(watch)
        assert lines == []


def test_a_long_gang_holds_no_worker_and_every_line_of_every_rank_comes_once(gang: Gang) -> None:
    watch = leave_running(gang, COUNT)
    first = list(gang.lines)
    assert gang.others() != []
    news, between = wait_without_worker(watch)
    assert news["reason"] == "its step has ended"

    resumed = gang.launcher()
    assert resumed.recover(gang.name, gang.handle)
    last = gang.run_gang(COUNT, resumed, detach=True, news=news)

    for rank in range(2):
        own = [line for line in first + between + last if line.startswith(f"[rank {rank}]")]
        assert own == [f"[rank {rank}] line {i}" for i in range(40)]
    gang.assert_nothing_left()


def test_a_gang_waits_for_gpus_without_a_worker_until_it_has_waited_long_enough(
    gang: Gang, gpus: int
) -> None:
    fields = {"defer_after_seconds": 0, "schedule_timeout_seconds": 5}
    wanted = {"nodes": gpus + 1, "resources": ResourcesSpec(gpus=1), "detach": True}
    with pytest.raises(DetachedError) as left:
        gang.run_gang(WAIT, gang.launcher(**fields), **wanted)
    news, _ = wait_without_worker(left.value.watch)
    assert news["reason"] == "no node took it in time"

    resumed = gang.launcher(**fields)
    assert not resumed.recover(gang.name, gang.handle)
    with pytest.raises(ComputeUnavailableError, match=r"Insufficient nvidia\.com/gpu"):
        gang.run_gang(WAIT, resumed, news=news, **wanted)
    gang.assert_nothing_left()


def test_a_rank_that_fails_while_no_worker_looks_is_told_with_its_log(gang: Gang) -> None:
    script = """
        import os, sys, time
        print("begun", flush=True)
        time.sleep(15)  # by then its worker has left
        if os.environ["RANK"] == "1":
            sys.exit("out of data")
        time.sleep(600)
        """
    watch = leave_running(gang, script)
    news, _ = wait_without_worker(watch)

    with pytest.raises(StepFailedError, match=r"node 1 of 2 .*: exit code 1") as caught:
        gang.run_gang(script, gang.launcher(), detach=True, news=news)
    assert "  out of data" in caught.value.log_tail
    gang.assert_nothing_left()


def test_a_pod_that_is_gone_while_no_worker_looks_is_told_by_the_next(gang: Gang) -> None:
    watch = leave_running(gang, WAIT)
    (name,) = [pod.metadata.name for pod in gang.look.pods() if "-1-" in pod.metadata.name]
    make_api(gang.kubeconfig).delete_namespaced_pod(name, gang.namespace, grace_period_seconds=1)
    news, _ = wait_without_worker(watch)

    with pytest.raises(RelaunchError, match="launched again"):
        gang.run_gang(WAIT, gang.launcher(), detach=True, news=news)
    gang.handle.set(None)
    gang.assert_nothing_left()


def test_a_task_that_is_stopped_while_no_worker_looks_leaves_nothing(gang: Gang) -> None:
    watch = leave_running(gang, WAIT)
    awaiter = PodAwaiter(PodWatch.from_dict(watch), lambda *_: None, token="a trigger")
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(awaiter.wait(), 2))

    assert not asyncio.run(remove_pods(PodWatch.from_dict(watch), token="another"))
    assert gang.look.pods() != []
    assert asyncio.run(remove_pods(PodWatch.from_dict(watch), token="a trigger"))
    gang.handle.set(None)
    gang.assert_nothing_left()


def test_a_kill_leaves_nothing_of_any_pod_though_the_api_server_is_not_well(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(gang.kubeconfig, gang.root / "kubeconfig") as gate:
        monkeypatch.setenv("KUBECONFIG", str(gang.root / "kubeconfig"))
        launcher = gang.launcher()
        running = gang.begin(WAIT, launcher)
        wait_until(lambda: gang.count("begun") == 2, "both ranks run")
        gate.refuse("DELETE", "/jobs/", 503)
        gate.refuse("GET", "/jobs/", 429)
        gate.refuse("GET", "/pods?", 429)
        started = time.monotonic()
        launcher.kill()
        assert time.monotonic() - started < 5
        assert gate.were_used()
        with pytest.raises(StepFailedError, match="it was killed"):
            running.wait()
    gang.assert_nothing_left()


def test_pods_that_work_for_longer_than_they_wait_for_a_worker_are_kept_by_one_that_is_there(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Six hours and one hour, as seconds.
    age = "$(($(date +%s) - $(stat -c %Y control/contact)))"
    shorter = KEEP.replace(
        f"find control/contact -mmin -{KEPT_MINUTES}", f"test {age} -lt 12 && echo"
    )
    shorter = shorter.replace("echo)", "echo there)").replace("sleep 30", "sleep 1")
    monkeypatch.setattr(pod_module, "KEEP", shorter)
    monkeypatch.setattr(contact, "_CONTACT_SECONDS", 1.5)
    script = """
    import os, time
    time.sleep(25)
    os.makedirs("/mlp/outputs/model", exist_ok=True)
    open("/mlp/outputs/model/part-" + os.environ["RANK"], "w").close()
    """
    gang.run_gang(script, nodes=2)
    model = gang.root / "outputs" / "model"
    assert sorted(file.name for file in model.iterdir()) == ["part-0", "part-1"]


def test_a_gang_is_ended_at_its_timeout(gang: Gang) -> None:
    with pytest.raises(StepFailedError, match="timeout of 3 seconds"):
        gang.run_gang(WAIT, timeout_seconds=3)
    gang.assert_nothing_left()


def test_a_gang_that_needs_more_gpus_than_there_are_ends_in_words_and_gives_back_all(
    gang: Gang, gpus: int
) -> None:
    launcher = gang.launcher(schedule_timeout_seconds=4)
    with pytest.raises(ComputeUnavailableError) as caught:
        gang.run_gang(WAIT, launcher, nodes=gpus + 1, resources=ResourcesSpec(gpus=1))

    assert f"it needs {gpus + 1} nodes together, and of these" in str(caught.value)
    assert "Insufficient nvidia.com/gpu" in str(caught.value)
    assert gang.count("begun") == 0
    gang.assert_nothing_left()


def test_a_quota_that_leaves_no_room_for_all_is_told_and_gives_back_what_there_was(
    gang: Gang, gpus: int
) -> None:
    api = make_api(gang.kubeconfig)
    quota = {
        "metadata": {"name": gang.name},
        "spec": {"hard": {"requests.nvidia.com/gpu": "1"}},
    }
    api.create_namespaced_resource_quota(gang.namespace, quota)
    try:
        launcher = gang.launcher(schedule_timeout_seconds=5)
        with pytest.raises(ComputeUnavailableError, match="exceeded quota"):
            gang.run_gang(WAIT, launcher, nodes=gpus, resources=ResourcesSpec(gpus=1))
    finally:
        api.delete_namespaced_resource_quota(gang.name, gang.namespace)
    gang.assert_nothing_left()


def test_a_gang_that_a_queue_holds_back_begins_when_it_is_let_go(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes import client

    def plan_suspended(*arguments: Any) -> Any:
        """What Kueue's webhook does to a Job of a queue."""
        spec = plan_gang(*arguments)
        spec.job["spec"]["suspend"] = True
        return spec

    monkeypatch.setattr(launcher, "plan_gang", plan_suspended)
    with pytest.raises(ComputeUnavailableError, match="it waits in queue 'research'"):
        gang.run_gang(WAIT, gang.launcher(queue="research", schedule_timeout_seconds=2))
    gang.assert_nothing_left()

    running = gang.begin("print('let go')", gang.launcher(queue="research"))
    wait_until(lambda: any("job" in each for each in gang.others()), "the Job is there")
    time.sleep(1)
    assert gang.look.pods() == []
    jobs = client.BatchV1Api(gang.look.api.api_client)
    jobs.patch_namespaced_job(gang.name, gang.namespace, {"spec": {"suspend": False}})
    running.wait()

    assert gang.count("let go") == 2
    gang.assert_nothing_left()


def test_a_gang_gets_its_gpus_and_waits_in_the_queue_as_one(gang: Gang, gpus: int) -> None:
    launcher = gang.launcher(queue="research", schedule_timeout_seconds=60)
    running = gang.begin(
        "import time; time.sleep(3)", launcher, nodes=gpus, resources=ResourcesSpec(gpus=1)
    )
    pods = wait_until(
        lambda: len(gang.look.pods()) == gpus and gang.look.pods(), "all pods are made"
    )
    from kubernetes import client

    job = client.BatchV1Api(gang.look.api.api_client).read_namespaced_job(gang.name, gang.namespace)
    running.wait()

    assert job.metadata.labels["kueue.x-k8s.io/queue-name"] == "research"
    assert job.spec.completion_mode == "Indexed"
    assert (job.spec.completions, job.spec.parallelism, job.spec.backoff_limit) == (gpus, gpus, 0)
    for pod in pods:
        assert "kueue.x-k8s.io/queue-name" not in pod.metadata.labels
        (step,) = [each for each in pod.spec.containers if each.name == "step"]
        assert step.resources.limits["nvidia.com/gpu"] == "1"
    gang.assert_nothing_left()


def test_an_image_that_can_t_be_had_leaves_nothing(gang: Gang) -> None:
    with pytest.raises(StepFailedError, match=r"node \d of 2 .*'no such image!' can't be had"):
        gang.run_gang(WAIT, gang.launcher(image="no such image!"), image="no such image!")
    gang.assert_nothing_left()


def test_real_mpi_reduces_over_pods_without_any_sshd(gang: Gang, tmp_path: Path) -> None:
    state = gang.kubeconfig.parent
    if not (state / "containerd.sock").exists() or shutil.which("ctr") is None:
        missing("an image can only be copied into the cluster that tests/cluster starts")
    image = make_mpi_image(tmp_path)
    copy = f"docker save {image} | ctr --address {state}/containerd.sock --namespace k8s.io images import -"
    subprocess.run(
        ["bash", "-o", "pipefail", "-c", copy], check=True, capture_output=True, timeout=200
    )
    script = MPI_REDUCE + "\n    import socket; print('on', socket.gethostname(), flush=True)\n"

    lines = gang.run_gang(
        script, gang.launcher(image=image), nodes=3, processes=2, framework="mpi", image=image
    )

    assert {f"[rank {rank}] total 21 of 6" for rank in range(6)} <= set(lines)
    hosts = {line.split()[-1] for line in lines if "] on " in line}
    assert hosts == {f"{gang.name}-{node}" for node in range(3)}
    gang.assert_nothing_left()
