"""What becomes of a step's pod on a real cluster, and what a user is told when it goes wrong."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from airflow_mlpipelines.compute.base import RelaunchError, Stage, StepLaunch
from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher, reconnecting
from airflow_mlpipelines.compute.kubernetes.channel import Channel, ChannelError
from airflow_mlpipelines.definition.graph import (
    EnvironmentSpec,
    KubernetesComputeSpec,
    ResourcesSpec,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from airflow_mlpipelines.execution.handles import FileHandle
from tests.integration.kubernetes.steps import (
    IMAGE,
    Look,
    Wire,
    make_api,
    own_namespace,
    wait_until,
)
from tests.unit.compute.launcher_contract import Running, Workbench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kubernetes
MEBIBYTE = 1 << 20


@dataclass
class PodStep:
    """One step run on the cluster, and every pod and thread that a test makes for it."""

    root: Path
    kubeconfig: Path
    namespace: str
    name: str = field(default_factory=lambda: f"mlp-test-{uuid.uuid4().hex[:12]}")
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("code/outputs", "code/logs", "runtime", "run", "outputs", "inputs"):
            (self.root / name).mkdir(parents=True)
        self.data = self.root / "inputs" / "table.csv"
        self.data.write_text("a,b\n1,2\n")
        self.handle = FileHandle(self.root / "handle.json")
        self.look = Look(self.kubeconfig, self.namespace, self.name)

    @property
    def stage(self) -> Stage:
        return Stage(
            root=self.root,
            code=self.root / "code",
            runtime=self.root / "runtime",
            run=self.root / "run",
            inputs={"table": self.data},
            outputs={"model": self.root / "outputs" / "model"},
            outputs_root=self.root / "outputs",
        )

    def launcher(self, **fields: Any) -> KubernetesLauncher:
        fields = {"image": IMAGE, "namespace": self.namespace, "in_cluster": False, **fields}
        return KubernetesLauncher(KubernetesComputeSpec(name="cluster", **fields))

    def launch(self, *argv: str, **changes: Any) -> StepLaunch:
        fields: dict[str, Any] = {
            "step_run_id": self.name,
            "step_name": "train",
            "argv": argv,
            "env": {"PYTHONUNBUFFERED": "1"},
            "secrets": {},
            "stage": self.stage,
            "resources": ResourcesSpec(),
            "image": IMAGE,
            "labels": {"dag_id": "flights of 2013!", "task_id": "train"},
        }
        return StepLaunch(**fields | changes)

    def run(
        self, *argv: str, launcher: KubernetesLauncher | None = None, **changes: Any
    ) -> list[str]:
        launcher = launcher or self.launcher()
        self.lines = []
        launcher.run(self.launch(*argv, **changes), emit=self.lines.append, handle=self.handle)
        assert launcher.release(self.name, self.handle)
        return self.lines

    def python(self, program: str, **changes: Any) -> list[str]:
        return self.run("python3", "-c", program, **changes)

    def start(
        self, program: str, launcher: KubernetesLauncher | None = None, **changes: Any
    ) -> Running:
        """Run a program beside the test; return once it runs."""
        running = _Running(self, program, launcher, changes)
        wait_until(lambda: self.look.is_running() or running.error, "the step runs")
        return running


class _Running(Running):
    def __init__(
        self,
        step: PodStep,
        program: str,
        launcher: KubernetesLauncher | None,
        changes: dict[str, Any],
    ) -> None:
        self._step = step
        super().__init__(step, (program,), {"launcher": launcher, **changes})  # type: ignore[arg-type]

    def _run(self, bench: Workbench, arguments: Any, options: dict[str, Any]) -> None:
        try:
            self._step.python(*arguments, **options)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            self.error = error


@pytest.fixture
def step(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PodStep]:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    made = PodStep(tmp_path / "step", cluster.kubeconfig, cluster.namespace)
    left = None
    try:
        yield made
        left = made.look.remove()
    finally:
        made.look.remove()
    assert left == []


# ---- what is asked of the cluster --------------------------------------------------------------


def test_a_step_has_its_limits_its_labels_and_no_rights(step: PodStep) -> None:
    compute = step.launcher(
        labels={"team": "ml"}, annotations={"cost": "centre 7"}, shm_size=32 * MEBIBYTE
    )
    running = step.start(
        "import os, time; print(os.getuid(), os.path.ismount('/dev/shm'), os.environ['HOME'])\n"
        "open(os.path.expanduser('~/x'), 'w').close()\n"
        "time.sleep(4)",
        compute,
        resources=ResourcesSpec(cpus=0.5, memory=64 * MEBIBYTE, gpus=1),
    )
    pod = step.look.pod()
    running.wait()
    uid = os.getuid() or 1000
    assert step.lines == [f"{uid} True /mlp/home"]
    assert pod.metadata.labels["team"] == "ml"
    assert pod.metadata.labels["airflow-mlpipelines.dag_id"].startswith("flights_of_2013-")
    assert pod.metadata.annotations["airflow-mlpipelines.dag_id"] == "flights of 2013!"
    assert pod.metadata.annotations["cost"] == "centre 7"
    container = next(c for c in pod.spec.containers if c.name == "step")
    amounts = {"cpu": "500m", "memory": str(64 * MEBIBYTE), "nvidia.com/gpu": "1"}
    assert container.resources.limits == amounts
    assert container.resources.requests == amounts
    assert container.security_context.allow_privilege_escalation is False
    assert pod.spec.security_context.run_as_non_root is True


def test_an_input_can_not_be_written(step: PodStep) -> None:
    with pytest.raises(StepFailedError, match="Read-only file system"):
        step.python("open('/mlp/inputs/table/table.csv', 'a')")


def test_a_secret_is_a_variable_and_nowhere_in_the_pod(step: PodStep) -> None:
    running = step.start(
        "import os, time; print(os.environ['PASSWORD'][::-1]); time.sleep(3)",
        secrets={"PASSWORD": "canary 4711 ü"},
    )
    pod, secrets = step.look.pod(), step.look.secrets()
    running.wait()
    assert step.lines == ["ü 1174 yranac"]
    assert "4711" not in str(pod)
    assert [owner.uid for owner in secrets[0].metadata.owner_references] == [pod.metadata.uid]
    assert step.look.secrets() == []


def test_a_pod_template_is_the_base_that_a_step_is_laid_over(step: PodStep) -> None:
    template = step.root / "pod.yaml"
    template.write_text(
        """
        kind: Pod
        metadata: {labels: {from: template}}
        spec:
          terminationGracePeriodSeconds: 7
          containers:
          - name: base
            image: never-used:1
            env: [{name: FROM_TEMPLATE, value: "yes"}, {name: WHO, value: template}]
            volumeMounts: [{name: scratch, mountPath: /scratch}]
          volumes: [{name: scratch, emptyDir: {}}]
        """
    )
    lines = step.python(
        "import os; print(os.environ['FROM_TEMPLATE'], os.environ['WHO'], os.path.ismount('/scratch'))",
        launcher=step.launcher(pod_template_file=str(template)),
        env={"WHO": "step"},
    )
    assert lines == ["yes step True"]


def test_outputs_and_run_files_come_back_as_they_were_made(step: PodStep) -> None:
    step.python(
        "import os\n"
        "os.makedirs('/mlp/outputs/model/deep/er')\n"
        "name = 'x' * 120\n"
        "os.makedirs('/mlp/outputs/model/' + name + '/' + name)\n"
        "open('/mlp/outputs/model/' + name + '/' + name + '/ü', 'w').write('long')\n"
        "open('/mlp/outputs/model/deep/er/data', 'wb').write(bytes(range(256)) * 40000)\n"
        "os.symlink('deep/er/data', '/mlp/outputs/model/link')\n"
        "open('/mlp/outputs/model/run.sh', 'w').close(); os.chmod('/mlp/outputs/model/run.sh', 0o555)\n"
        "open('outputs/report', 'w').write('kept'); open('logs/x', 'w').write('kept')\n"
        "open('/mlp/run/metrics.jsonl', 'w').write('{}')\n"
    )
    model = step.root / "outputs" / "model"
    name = "x" * 120
    assert (model / name / name / "ü").read_text() == "long"
    assert (model / "deep/er/data").read_bytes() == bytes(range(256)) * 40_000
    assert os.readlink(model / "link") == "deep/er/data"
    assert os.access(model / "run.sh", os.X_OK)
    assert (step.root / "code/outputs/report").read_text() == "kept"
    assert (step.root / "code/logs/x").read_text() == "kept"
    assert (step.root / "run/metrics.jsonl").read_text() == "{}"
    assert sorted(path.name for path in (step.root / "outputs").iterdir()) == ["model"]


def test_metrics_arrive_while_the_step_runs(step: PodStep) -> None:
    running = step.start(
        "import time; open('/mlp/run/metrics.jsonl', 'w').write('{}'); time.sleep(8)"
    )
    wait_until((step.root / "run" / "metrics.jsonl").exists, "the metrics are here", seconds=20)
    assert step.look.is_running()
    running.wait()


# ---- connections that break ----------------------------------------------------------------------


def test_a_step_begins_only_with_all_of_its_files(
    step: PodStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    (step.root / "code" / "weights").write_bytes(os.urandom(MEBIBYTE))
    real, broken = Channel.write, []

    def write(self: Channel, data: bytes) -> None:
        if not broken and len(data) > 200_000:
            broken.append(True)
            real(self, data[:70_000])
            self.__exit__()
            raise ChannelError("cut")
        real(self, data)

    monkeypatch.setattr(Channel, "write", write)
    assert step.python("import os; print(os.path.getsize('weights'))") == [str(MEBIBYTE)]
    assert broken


def test_a_step_outlasts_an_api_server_that_is_away(
    step: PodStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(step.kubeconfig, step.root / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(step.root / "kubeconfig"))
    try:
        running = step.start(
            "import time\n"
            "for i in range(160): print(i); time.sleep(0.05)\n"
            "open('/mlp/outputs/model', 'w').write('made')"
        )
        wire.cut(seconds=1)
        time.sleep(2)
        wire.cut(seconds=12)  # the step ends meanwhile
        running.wait()
    finally:
        wire.close()
    assert step.lines == [str(i) for i in range(160)]
    assert (step.root / "outputs" / "model").read_text() == "made"


@pytest.mark.parametrize("replacement", [lambda _: b"", lambda chunk: bytes(len(chunk))])
def test_an_archive_of_outputs_that_arrives_damaged_is_fetched_again(
    step: PodStep, monkeypatch: pytest.MonkeyPatch, replacement: Callable[[bytes], bytes]
) -> None:
    real, seen, lost_at = Channel.read, [], 5

    def read(self: Channel) -> Iterator[bytes]:
        for number, chunk in enumerate(real(self)):
            if len(chunk) >= 1000:
                seen.append(number)
                if len(seen) == lost_at:
                    yield replacement(chunk)
                    continue
            yield chunk

    monkeypatch.setattr(Channel, "read", read)
    step.python("open('/mlp/outputs/model', 'wb').write(b'0123456789abcdef' * 100000)")
    assert (step.root / "outputs" / "model").read_bytes() == b"0123456789abcdef" * 100_000
    assert len(seen) > lost_at


def test_outputs_that_can_not_be_read_fail_the_step(
    step: PodStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnecting, "_ATTEMPTS", 1)
    with pytest.raises(StepFailedError, match="can't be fetched"):
        step.python("import os; os.mkdir('/mlp/outputs/model'); os.chmod('/mlp/outputs/model', 0)")


# ---- failures, in words ------------------------------------------------------------------------


def test_out_of_memory_names_the_limit_and_is_not_repeated(step: PodStep) -> None:
    with pytest.raises(
        StepFailedError, match=r"memory limit of 48.0 MiB.*Raise memory="
    ) as failure:
        step.python("x = b'x' * (200 << 20)", resources=ResourcesSpec(memory=48 * MEBIBYTE))
    assert not failure.value.retryable
    assert failure.value.exit_code == 137


def test_an_image_that_is_nowhere_is_named_and_not_tried_again(step: PodStep) -> None:
    launcher = step.launcher(image="Not A Name")
    launcher.prepare_environment(None, launcher.resolve_environment(None), emit=print)
    with pytest.raises(StepFailedError, match=r"'Not A Name'.*InvalidImageName") as failure:
        step.python("", launcher=launcher, image="Not A Name")
    assert not failure.value.retryable


def test_a_pod_that_fits_nowhere_is_told_in_the_schedulers_words(step: PodStep) -> None:
    launcher = step.launcher(schedule_timeout_seconds=2)
    with pytest.raises(ComputeUnavailableError, match=r"Insufficient nvidia.com/gpu") as failure:
        step.python("", launcher=launcher, resources=ResourcesSpec(gpus=64))
    assert "schedule_timeout_seconds" in str(failure.value)
    assert step.handle.get() is None


def test_a_gpu_type_that_no_node_has_is_waited_for(step: PodStep) -> None:
    launcher = step.launcher(schedule_timeout_seconds=2)
    with pytest.raises(ComputeUnavailableError, match="gpu_type"):
        step.python("", launcher=launcher, resources=ResourcesSpec(gpus=1, gpu_type="H900"))


def test_a_namespace_that_is_not_there_is_named(step: PodStep) -> None:
    with pytest.raises(StepFailedError, match=r"no namespace 'nowhere'") as failure:
        step.python("", launcher=step.launcher(namespace="nowhere"))
    assert not failure.value.retryable


def test_a_namespace_that_admits_no_root_says_so(step: PodStep) -> None:
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    with own_namespace(step.kubeconfig, **restricted) as namespace:
        with pytest.raises(StepFailedError, match=r"PodSecurity") as failure:
            step.python(
                "", launcher=step.launcher(namespace=namespace, security_context={"runAsUser": 0})
            )
        assert not failure.value.retryable
        assert step.python("print(1)", launcher=step.launcher(namespace=namespace)) == ["1"]


def test_an_expired_token_is_told(step: PodStep, monkeypatch: pytest.MonkeyPatch) -> None:
    other = step.root / "kubeconfig"
    config = yaml.safe_load(step.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": "expired"}
    other.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(other))
    with pytest.raises(ComputeUnavailableError, match=r"401.*expired"):
        step.python("")


def test_a_pod_that_somebody_deletes_is_launched_again(step: PodStep) -> None:
    running = step.start("import time; print('on'); time.sleep(60)")
    step.look.api.delete_namespaced_pod(step.look.name, step.namespace, grace_period_seconds=1)
    with pytest.raises(RelaunchError, match=r"\(deleted while it ran\).*1 of 5"):
        running.wait()
    assert step.python("print('second')") == ["second"]
    assert step.handle.get() is None


def test_a_step_whose_pods_are_lost_time_and_again_fails_without_blame(step: PodStep) -> None:
    step.handle.set({"launcher": "kubernetes", "relaunches": 5})
    running = step.start("import time; print('on'); time.sleep(60)")
    eviction = {
        "metadata": {"name": step.look.name},
        "deleteOptions": {"gracePeriodSeconds": 5},
    }
    step.look.api.create_namespaced_pod_eviction(step.look.name, step.namespace, eviction)
    with pytest.raises(StepFailedError, match=r"EvictionByEvictionAPI.*not to blame") as failure:
        running.wait()
    assert failure.value.retryable
    assert step.handle.get() is None


# ---- one pod for each step run ------------------------------------------------------------------


@pytest.mark.parametrize("lost_in", ["deliver", "create_secret"])
def test_a_pod_that_never_got_its_files_is_begun_anew(
    step: PodStep, monkeypatch: pytest.MonkeyPatch, lost_in: str
) -> None:
    def lose(*_: Any) -> None:
        raise KeyboardInterrupt

    if lost_in == "deliver":
        (step.root / "code" / "weights").write_bytes(os.urandom(MEBIBYTE))  # too large for a Secret
    with monkeypatch.context() as patch:
        patch.setattr(f"airflow_mlpipelines.compute.kubernetes.attending.{lost_in}", lose)
        patch.setattr(
            "airflow_mlpipelines.compute.kubernetes.attending.discard", lambda *_, **__: None
        )
        with pytest.raises(KeyboardInterrupt):
            step.python("print(1)")
    first = step.look.pod().metadata.uid
    launcher = step.launcher()
    assert launcher.recover(step.name, step.handle) is False
    assert step.look.pods() == []
    assert step.python("print(2)", launcher=launcher) == ["2"]
    assert first


def test_a_pod_that_got_its_files_by_itself_is_adopted_from_a_worker_that_saw_nothing_of_it(
    step: PodStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "airflow_mlpipelines.compute.kubernetes.following.PodFollower.await_step", lose
        )
        patch.setattr(
            "airflow_mlpipelines.compute.kubernetes.attending.discard", lambda *_, **__: None
        )
        with pytest.raises(KeyboardInterrupt):
            step.python("import time; print('first'); time.sleep(15)")
    first = step.look.pod().metadata.uid
    wait_until(step.look.is_running, "the step runs")
    step.handle.set({"launcher": "kubernetes", "pod": first})  # as a lost worker leaves it
    launcher = step.launcher()
    assert launcher.recover(step.name, step.handle)
    assert step.python("print('second')", launcher=launcher) == ["first"]
    assert step.look.secrets() == []


def test_a_worker_that_was_given_up_does_not_kill_its_successors_pod(step: PodStep) -> None:
    first, second = step.launcher(), step.launcher()
    one = step.start("import time; time.sleep(6); print('done')", first)
    two = _Running(step, "", second, {})
    wait_until(
        lambda: step.look.pod().metadata.annotations["airflow-mlpipelines.owner"] == second._token,
        "the second try has adopted it",
    )
    first.kill()
    time.sleep(1)
    assert step.look.is_running()
    two.wait()
    assert step.lines[-1:] == ["done"]
    with pytest.raises(StepFailedError, match=r"later try|killed"):
        one.wait()


def test_a_pod_of_somebody_else_is_left_alone(step: PodStep) -> None:
    api = make_api(step.kubeconfig)
    other = {
        "metadata": {"name": step.look.name},
        "spec": {"containers": [{"name": "x", "image": IMAGE, "command": ["sleep", "60"]}]},
    }
    api.create_namespaced_pod(step.namespace, other)
    try:
        with pytest.raises(ComputeUnavailableError, match="taken by another pod"):
            step.python("print(1)")
    finally:
        api.delete_namespaced_pod(step.look.name, step.namespace, grace_period_seconds=0)


# ---- the environment ----------------------------------------------------------------------------


def test_only_an_image_by_digest_can_be_reused(step: PodStep) -> None:
    launcher = step.launcher()
    by_tag = launcher.resolve_environment(EnvironmentSpec(image="train:1"))
    assert not by_tag.cacheable
    assert "'train:1'" in str(by_tag.problem)
    digest = "sha256:" + "a" * 64
    pinned = launcher.resolve_environment(EnvironmentSpec(image=f"train@{digest}"))
    assert pinned.cacheable
    assert pinned.description["digest"] == digest
