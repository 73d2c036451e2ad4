"""Steps that share the GPUs of a Docker host: no two have the same one, whatever has crashed."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute import local as local_module
from airflow_mlpipelines.compute.docker import gpu_claims
from airflow_mlpipelines.compute.gpus import Gpu
from airflow_mlpipelines.compute.local import LocalLauncher
from airflow_mlpipelines.definition.graph import DockerComputeSpec, LocalComputeSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import StepFailedError
from tests.gangs import free_ports
from tests.integration.docker.conftest import DockerStep, wait_until
from tests.integration.docker.gpu_daemon import BUSYBOX, gpu_daemon
from tests.parts import require_docker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.docker.gpu_daemon import GpuDaemon

pytestmark = pytest.mark.docker
GPUS = ("0", "1", "2", "3")
UNTIL_TOLD = 'echo "got $NVIDIA_VISIBLE_DEVICES"; until [ -e /mlp/run/go ]; do sleep 0.1; done'


@pytest.fixture(scope="module")
def daemon() -> Iterator[GpuDaemon]:
    require_docker()
    root = Path(tempfile.mkdtemp(prefix="mlp-gpus-"))  # short: it is the path of a socket
    with gpu_daemon(root, free_ports(1)[0]) as started:
        yield started


@dataclass
class Host:
    """A Docker host with GPUs, and the steps that a test runs on it."""

    root: Path
    url: str
    steps: list[Step] = field(default_factory=list)

    def step(self, name: str, gpus: Any = GPUS) -> Step:
        root = self.root / name
        root.mkdir()
        compute = DockerComputeSpec(
            name="d", image=BUSYBOX, gpus=gpus, docker_url=self.url, user="0:0"
        )
        made = Step(root, compute=compute)
        self.steps.append(made)
        return made


class Step(DockerStep):
    """A step that says which GPUs it has got, and goes on until it is told to end."""

    def begin(self, count: int = 1, script: str = UNTIL_TOLD, **fields: Any) -> Step:
        launch = self.launch(
            "sh", "-c", script, image=BUSYBOX, resources=ResourcesSpec(gpus=count), **fields
        )
        self.launcher, self.thread, self.ended = self.run_in_thread(launch)
        return self

    def got(self) -> list[str]:
        """Return the GPUs of each of its containers."""
        return [line.removeprefix("got ") for line in self.lines if line.startswith("got ")]

    def wait_for_gpus(self) -> str:
        return str(wait_until(self.got, "it has its GPUs")[0])

    def end(self) -> None:
        (self.root / "run" / "go").touch()
        self.thread.join(30)
        assert self.ended == [None]


@pytest.fixture(params=["local socket"])
def host(
    daemon: GpuDaemon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Host]:
    monkeypatch.setenv("DOCKER_HOST", daemon.socket)  # for what looks at the containers
    monkeypatch.setattr(gpu_claims, "machine_gpus", list)  # a real GPU here would not be these
    monkeypatch.setattr(local_module, "machine_gpus", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = Host(tmp_path, daemon.remote if request.param == "remote" else daemon.socket)
    try:
        yield made
    finally:
        for step in made.steps:
            step.clean()


remote_too = pytest.mark.parametrize("host", ["local socket", "remote"], indirect=True)


@remote_too
def test_steps_at_once_get_gpus_of_their_own_and_the_next_waits_for_one(host: Host) -> None:
    steps = [host.step(f"s{number}").begin() for number in range(4)]
    assert sorted(step.wait_for_gpus() for step in steps) == list(GPUS)

    waiting = host.step("waiting").begin()
    wait_until(lambda: waiting.lines, "it says that it waits")
    assert waiting.lines[0].startswith(
        "Waiting for 1 of the 4 GPUs of this compute: GPU 0 is held by"
    )
    free = steps[2].got()[0]
    steps[2].end()

    assert waiting.wait_for_gpus() == free
    for step in (steps[0], steps[1], steps[3], waiting):
        step.end()


@remote_too
def test_the_nodes_of_a_gang_get_gpus_that_no_other_step_has(host: Host) -> None:
    one = host.step("one", 4).begin()
    taken = one.wait_for_gpus()
    gang = host.step("gang", 4).begin(nodes=3)
    wait_until(lambda: len(gang.got()) == 3, "all nodes run")

    assert sorted([taken, *gang.got()]) == list(GPUS)
    one.end()
    gang.end()


def test_a_container_keeps_its_gpu_when_its_worker_is_killed(host: Host) -> None:
    lost = host.step("lost", ("0",))
    launch = lost.launch("sh", "-c", UNTIL_TOLD, image=BUSYBOX, resources=ResourcesSpec(gpus=1))
    worker = lost.run_in_worker(launch)
    wait_until(lambda: "got 0" in lost.worker_log, "the container runs")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()

    other = host.step("other", ("0",)).begin()
    wait_until(lambda: other.lines, "it says that it waits")
    assert "in a container that its worker has left" in other.lines[0]
    (lost.root / "run" / "go").touch()  # it ends, and nobody has adopted it
    assert other.wait_for_gpus() == "0"
    other.end()


def test_who_adopts_a_container_has_its_gpus(host: Host) -> None:
    lost = host.step("lost", ("0", "1"))
    launch = lost.launch("sh", "-c", UNTIL_TOLD, image=BUSYBOX, resources=ResourcesSpec(gpus=2))
    worker = lost.run_in_worker(launch)
    wait_until(lambda: "got 0,1" in lost.worker_log, "the container runs")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()

    lost.begin(2)  # the next try
    wait_until(lambda: lost.got() == ["0,1"], "it is adopted")
    other = host.step("other", ("0", "1")).begin()
    wait_until(lambda: other.lines, "it says that it waits")
    assert f"process {os.getpid()})" in other.lines[0]
    assert "has left" not in other.lines[0]
    lost.end()
    assert other.wait_for_gpus() == "0"
    other.end()


def test_a_local_step_and_a_container_do_not_share_a_gpu(host: Host, tmp_path: Path) -> None:
    docker = host.step("docker", ("nvidia.com/gpu=0",))
    # This daemon knows nothing of CDI: the name is one that only the lock is asked for.
    assert [gpu.key for gpu in gpu_claims.daemon_gpus(docker.compute, [], needed=1)] == ["0"]
    docker.compute = DockerComputeSpec(
        name="d", image=BUSYBOX, gpus=("0",), docker_url=host.url, user="0:0"
    )
    docker.begin().wait_for_gpus()
    local = host.step("local")
    launcher = LocalLauncher(LocalComputeSpec(name="local", gpus=("0",)))
    launch = local.launch(
        "sh", "-c", "echo got $CUDA_VISIBLE_DEVICES", resources=ResourcesSpec(gpus=1)
    )
    arguments = {"emit": local.lines.append, "handle": local.handle}
    local.thread = threading.Thread(
        target=launcher.run, args=(launch,), kwargs=arguments, daemon=True
    )
    local.thread.start()
    wait_until(lambda: local.lines, "it says that it waits")
    assert "GPU 0 is held by step 'train'" in local.lines[0]
    docker.end()
    assert local.wait_for_gpus() == "0"
    local.thread.join(30)


@remote_too
def test_a_kill_ends_the_waiting(host: Host) -> None:
    holder = host.step("holder", ("0",)).begin()
    holder.wait_for_gpus()
    waiting = host.step("waiting", ("0",)).begin()
    wait_until(lambda: waiting.lines, "it says that it waits")
    waiting.launcher.kill()
    waiting.thread.join(10)
    assert isinstance(waiting.ended[0], StepFailedError)
    assert "killed while it waited for GPUs" in str(waiting.ended[0])
    assert waiting.containers == []
    holder.end()


def test_a_choice_of_gpus_that_was_abandoned_holds_up_nobody(
    host: Host, daemon: GpuDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.integration.docker.conftest import docker_cli

    monkeypatch.setattr(gpu_claims, "_ABANDONED_SECONDS", 2.0)
    docker_cli("create", "--name", "mlp-gpu-turnstile", BUSYBOX, "true")
    host.url = daemon.remote
    step = host.step("one").begin()
    assert step.wait_for_gpus() == "0"
    step.end()


def test_gpus_that_the_worker_sees_are_asked_for_by_the_driver_s_ids() -> None:
    machine = [Gpu("GPU-6a1c", "GPU-6a1c", "0"), Gpu("GPU-77d0", "GPU-77d0", "1")]

    def found(gpus: Any) -> list[tuple[str, str]]:
        compute = DockerComputeSpec(name="d", image=BUSYBOX, gpus=gpus)
        listed = gpu_claims.daemon_gpus(compute, machine, needed=1)
        return [(gpu.id, gpu.key) for gpu in listed]

    both = [("GPU-6a1c", "GPU-6a1c"), ("GPU-77d0", "GPU-77d0")]
    assert found(None) == both
    assert found(1) == both[:1]
    assert found(("1", "GPU-6a")) == both[::-1]
    assert found(("nvidia.com/gpu=1", "1")) == [("nvidia.com/gpu=1", "GPU-77d0")]
    assert found(("GPU-elsewhere",)) == [("GPU-elsewhere", "GPU-elsewhere")]
