"""Steps on several nodes: containers on a network of their own, which are there together or not at all."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.definition.graph import DockerComputeSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import StepFailedError
from tests.gangs import COUNT, FAIL_AT_3, HOG_AT_1, TELL_SECRET, WAIT, launch_fields, make_mpi_image
from tests.integration.docker.conftest import IMAGE, DockerStep, docker_cli, wait_until
from tests.unit.runtime.test_gang import ALL_REDUCE, MPI_REDUCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlpipelines.compute.base import StepLaunch

pytestmark = pytest.mark.docker


def gang(step: DockerStep, script: str, **fields: Any) -> StepLaunch:
    """Return the launch of a script on several nodes."""
    argv, launch = launch_fields(step.stage, step.root, script, **fields)
    return step.launch(*argv, **launch)


def networks(step: DockerStep) -> list[str]:
    return docker_cli("network", "ls", "-q", "--filter", f"name={step.name}").split()


def assert_nothing_left(step: DockerStep) -> None:
    assert step.containers == []
    assert networks(step) == []
    assert step.handle.get() is None


@pytest.fixture(autouse=True)
def _no_network_left(step: DockerStep) -> Iterator[None]:
    yield
    step.clean()
    left = networks(step)
    if left:
        docker_cli("network", "rm", *left)


@pytest.fixture(scope="module")
def mpi_image(image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    assert image
    return make_mpi_image(tmp_path_factory.mktemp("mpi"))


def test_ranks_of_several_containers_find_each_other_by_pytorch_s_variables(
    step: DockerStep,
) -> None:
    lines = step.run(gang(step, ALL_REDUCE, nodes=3, processes=2))

    assert "[rank 0] total 15" in lines
    places = {line.partition("] ")[2] for line in lines if " local " in line}
    assert places == {f"rank {rank} local {rank % 2} node {rank // 2}" for rank in range(6)}
    logs = sorted(path.name for path in (step.stage.code / "logs").iterdir())
    assert logs == [f"std_log_process_{rank}.txt" for rank in range(6)]
    assert_nothing_left(step)


def test_tensorflow_s_cluster_has_host_names_and_ports_that_answer(step: DockerStep) -> None:
    script = """
        import json, os, socket, time
        config = json.loads(os.environ["TF_CONFIG"])
        cluster, task = config["cluster"], config["task"]
        host, port = cluster[task["type"]][task["index"]].split(":")
        assert socket.gethostbyname(host) == socket.gethostbyname(socket.gethostname())
        with socket.create_server(("", int(port))) as server:
            for place in cluster["worker"] + cluster["ps"]:
                host, port = place.split(":")
                for _ in range(600):
                    try:
                        socket.create_connection((host, int(port))).close()
                        break
                    except ConnectionRefusedError:
                        time.sleep(0.05)
            print(json.dumps(task), "of", json.dumps(cluster), flush=True)
            for _ in cluster["worker"] + cluster["ps"]:
                server.accept()
        """
    lines = step.run(gang(step, script, framework="tensorflow", servers=1))

    told = [json.loads(line.partition(" of ")[2]) for line in lines if " of {" in line]
    assert len(told) == 3
    assert told[0] == told[1] == told[2]
    hosts = {kind: [place.split(":")[0] for place in told[0][kind]] for kind in told[0]}
    assert hosts == {"worker": ["node-0", "node-1"], "ps": ["node-0"]}


def test_a_chief_ends_a_cluster_whose_workers_and_servers_would_serve_for_ever(
    step: DockerStep,
) -> None:
    script = """
        import json, os, time
        config = json.loads(os.environ["TF_CONFIG"])
        kind = config["task"]["type"]
        print(kind, "of", {kind: len(found) for kind, found in sorted(config["cluster"].items())})
        time.sleep(1 if kind == "chief" else 600)
        """
    fields = {"framework": "tensorflow", "servers": 2, "chief": True}
    lines = step.run(gang(step, script, timeout_seconds=200, **fields))

    told = sorted(line.split(" ", 2)[2] for line in lines if " of {" in line)
    cluster = "of {'chief': 1, 'ps': 2, 'worker': 2}"
    assert told == [f"{kind} {cluster}" for kind in ("chief", "ps", "ps", "worker", "worker")]
    assert_nothing_left(step)


@pytest.mark.parametrize("user", [None, "12345:12345"])
def test_real_mpi_reduces_over_containers_without_any_sshd(
    step: DockerStep, mpi_image: str, user: str | None
) -> None:
    step.compute = DockerComputeSpec(name="d", image=mpi_image, user=user)
    script = MPI_REDUCE + "\n    import socket; print('on', socket.gethostname(), flush=True)\n"
    lines = step.run(gang(step, script, nodes=3, processes=2, framework="mpi", image=mpi_image))

    assert {f"[rank {rank}] total 21 of 6" for rank in range(6)} <= set(lines)
    hosts = [line.split()[-1] for line in lines if "] on " in line]
    assert sorted(hosts) == ["node-0", "node-0", "node-1", "node-1", "node-2", "node-2"]
    assert_nothing_left(step)


def test_an_mpi_rank_that_fails_on_another_node_ends_all(step: DockerStep, mpi_image: str) -> None:
    script = """
        import sys, time
        from mpi4py import MPI
        if MPI.COMM_WORLD.Get_rank() == 1:
            print("out of data", flush=True)
            import os; os._exit(3)
        time.sleep(600)
        """
    with pytest.raises(StepFailedError, match="node 1 of 2: exit code 3") as caught:
        step.run(gang(step, script, framework="mpi", image=mpi_image))

    assert caught.value.log_tail[-2:] == (
        "rank 1 of 2 ended with exit code 3; it ran on node 1 (node-1); all others were ended. "
        "The end of its log:",
        "  out of data",
    )
    assert_nothing_left(step)


def test_a_rank_that_fails_ends_the_gang_and_its_log_is_in_the_error(step: DockerStep) -> None:
    started = time.monotonic()
    with pytest.raises(StepFailedError, match="node 1 of 3: exit code 1") as caught:
        step.run(gang(step, FAIL_AT_3, nodes=3, processes=2))

    assert time.monotonic() - started < 60
    assert caught.value.exit_code == 1
    assert "  out of data" in caught.value.log_tail
    assert any(line.startswith("rank 3 of 6 ended with") for line in caught.value.log_tail)
    assert (
        "node 2 (node-2) ends, because of node 1 (node-1): rank 3 ended with exit code 1"
        in step.lines
    )
    ends = [line for line in step.lines if line.startswith("The end of the log of node")]
    assert ends == [
        "The end of the log of node 0 of 3:",
        "The end of the log of node 2 of 3:",
        "The end of the log of node 1 of 3, which failed:",
    ]
    assert step.lines[-1].strip() == "out of data"
    assert_nothing_left(step)


def test_a_node_that_is_lost_ends_the_gang(step: DockerStep) -> None:
    _, thread, ended = step.run_in_thread(gang(step, WAIT, nodes=3))
    wait_until(lambda: sum("begun" in line for line in step.lines) == 3, "all ranks run")
    docker_cli("kill", f"{step.name}-2")
    thread.join(60)

    assert "node 2 of 3: exit code 137" in str(ended[0])
    assert_nothing_left(step)


def test_a_node_without_enough_memory_is_named_with_its_limit(step: DockerStep) -> None:
    resources = ResourcesSpec(memory=64 << 20)
    with pytest.raises(
        StepFailedError, match="node 1 of 2: killed because it needed more"
    ) as caught:
        step.run(gang(step, HOG_AT_1, resources=resources))
    assert not caught.value.retryable
    assert_nothing_left(step)


def test_secrets_reach_every_node_and_the_gang_s_own_reaches_no_program(step: DockerStep) -> None:
    lines = step.run(gang(step, TELL_SECRET, secrets={"PASSWORD": "drowssap"}))
    assert sorted(line for line in lines if "secret" in line) == [
        "[rank 0] secret password False",
        "[rank 1] secret password False",
    ]


def test_a_retry_adopts_all_containers_of_a_killed_worker(step: DockerStep) -> None:
    launch = gang(step, COUNT)
    step.run_in_worker(launch)
    wait_until(lambda: "[rank 1] line 5" in step.worker_log, "the worker logs")
    worker = step.workers[-1]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    before = sorted(step.containers)
    assert len(before) == 2

    retry = DockerLauncher(step.compute)
    assert retry.recover(step.name, step.handle)
    assert sorted(step.containers) == before
    lines = step.run(launch, retry)

    for rank in range(2):
        own = [line for line in lines if line.startswith(f"[rank {rank}]")]
        assert own == [f"[rank {rank}] line {i}" for i in range(40)]
    assert_nothing_left(step)


def test_a_gang_that_is_not_whole_is_removed_by_the_next_try(step: DockerStep) -> None:
    launch = gang(step, WAIT)
    step.run_in_worker(launch)
    wait_until(lambda: "[rank 1] begun" in step.worker_log, "the worker logs")
    worker = step.workers[-1]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    docker_cli("rm", "-f", f"{step.name}-1")

    assert not DockerLauncher(step.compute).recover(step.name, step.handle)
    assert step.containers == []
    assert networks(step) == []


def test_a_kill_leaves_nothing_of_any_node(step: DockerStep) -> None:
    launcher, thread, ended = step.run_in_thread(gang(step, WAIT))
    wait_until(lambda: sum("begun" in line for line in step.lines) == 2, "all ranks run")
    started = time.monotonic()
    launcher.kill()
    seconds = time.monotonic() - started
    thread.join(20)

    assert seconds < 5
    assert "it was killed" in str(ended[0])
    assert_nothing_left(step)


def test_a_gang_is_ended_at_its_timeout(step: DockerStep) -> None:
    with pytest.raises(StepFailedError, match="timeout of 4 seconds"):
        step.run(gang(step, WAIT, timeout_seconds=4))
    assert_nothing_left(step)


def test_one_node_that_can_t_be_made_is_all_that_can_t(step: DockerStep) -> None:
    name = f"{step.name}-1"
    docker_cli("create", "--name", name, IMAGE, "true")
    try:
        with pytest.raises(Exception, match="is taken"):
            step.run(gang(step, WAIT))
        assert_nothing_left(step)
    finally:
        docker_cli("rm", "-f", name)


def test_gpus_of_a_gang_are_kept_apart_and_a_daemon_without_any_leaves_nothing(
    step: DockerStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docker import APIClient

    asked: list[Any] = []
    create = APIClient.create_container

    def note(self: APIClient, *arguments: Any, **fields: Any) -> Any:
        asked.append(fields["host_config"]["DeviceRequests"])
        return create(self, *arguments, **fields)

    monkeypatch.setattr(APIClient, "create_container", note)
    step.compute = DockerComputeSpec(name="d", image=IMAGE, gpus=4)
    with pytest.raises(StepFailedError, match="no GPU runtime"):
        step.run(gang(step, WAIT, resources=ResourcesSpec(gpus=2)))

    assert [requests[0]["DeviceIDs"] for requests in asked] == [["0", "1"], ["2", "3"]]
    assert_nothing_left(step)
    step.compute = DockerComputeSpec(name="d", image=IMAGE, gpus=("GPU-a", "GPU-b", "GPU-c"))
    with pytest.raises(StepFailedError, match="2 GPUs on each of 2 nodes, but compute 'd' has 3"):
        step.run(gang(step, WAIT, resources=ResourcesSpec(gpus=2)))
    assert_nothing_left(step)


def test_the_network_of_the_compute_can_be_reached_too(step: DockerStep) -> None:
    other = f"{step.name}-other"
    docker_cli("network", "create", other)
    try:
        step.compute = DockerComputeSpec(name="d", image=IMAGE, network_mode=other)
        script = """
            import os
            print("interfaces", len([i for i in os.listdir("/sys/class/net") if i != "lo"]))
            """
        lines = step.run(gang(step, script))
        assert sum("interfaces 2" in line for line in lines) == 2
    finally:
        docker_cli("network", "rm", other)
