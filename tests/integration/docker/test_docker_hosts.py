"""Workers with a Docker daemon each: a retry beside another daemon starts no second container."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.compute.docker.hosts import OWNER_FILE
from airflow_mlpipelines.definition.graph import DockerComputeSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError
from tests.integration.docker.cli import wait_until
from tests.integration.docker.second_daemon import SecondDaemon, start_second_daemon
from tests.parts import missing, require_docker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_mlpipelines.compute.base import StepLaunch
    from tests.integration.docker.conftest import DockerStep

pytestmark = pytest.mark.docker
IMAGE = "busybox:1.36"
OWN_SOCKET = "/var/run/docker.sock"
COUNT = "for i in $(seq 40); do echo line $i; sleep 0.05; done"
LINES = [f"line {number}" for number in range(1, 41)]


@pytest.fixture(scope="module")
def other() -> Iterator[SecondDaemon]:
    require_docker()
    if not os.path.exists(OWN_SOCKET):
        missing(f"no daemon on {OWN_SOCKET}")
    with start_second_daemon() as daemon:
        daemon.take(IMAGE)
        yield daemon


def make_compute(url: str) -> DockerComputeSpec:
    return DockerComputeSpec(name="d", image=IMAGE, docker_url=url, network_mode="none")


def lose_worker(step: DockerStep, url: str) -> StepLaunch:
    """Run the step in a worker that has the daemon at ``url``, and is killed in the middle of it."""
    step.compute = make_compute(url)
    launch = step.launch("sh", "-c", COUNT, image=IMAGE)
    worker = step.run_in_worker(launch)
    wait_until(lambda: "line 5" in step.worker_log, "the program is at work")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    step.compute = make_compute(f"unix://{OWN_SOCKET}")
    return launch


def find(daemon: SecondDaemon, step: DockerStep) -> str:
    return daemon.cli("ps", "--all", "--format", "{{.State}}", "--filter", f"name={step.name}")


def test_a_container_on_another_hosts_daemon_is_not_started_a_second_time(
    step: DockerStep, other: SecondDaemon, tmp_path: Path
) -> None:
    # Each of two hosts calls its daemon by the same URL.
    link = tmp_path / "docker.sock"
    link.symlink_to(other.socket)
    launch = lose_worker(step, f"unix://{link}")
    link.unlink()
    link.symlink_to(OWN_SOCKET)
    step.compute = make_compute(f"unix://{link}")
    host = other.cli("info", "--format", "{{.Name}}")

    for attempt in (
        lambda: DockerLauncher(step.compute).recover(step.name, step.handle),
        lambda: step.run(launch),
    ):
        with pytest.raises(ComputeUnavailableError, match=f"host '{host}'.*queue.*clear the task"):
            attempt()
    assert step.containers == []
    assert find(other, step) in ("running", "exited")

    link.unlink()
    link.symlink_to(other.socket)
    retry = DockerLauncher(step.compute)
    assert retry.recover(step.name, step.handle)
    assert step.run(launch, retry) == LINES
    assert find(other, step) == ""
    assert step.handle.get() is None


def test_a_container_on_a_daemon_that_can_be_reached_is_adopted_there(
    step: DockerStep, other: SecondDaemon
) -> None:
    launch = lose_worker(step, other.url)

    retry = DockerLauncher(step.compute)
    assert retry.recover(step.name, step.handle)
    assert step.run(launch, retry) == LINES
    assert step.containers == []
    assert find(other, step) == ""
    assert step.handle.get() is None


def test_a_container_whose_directory_is_another_hosts_is_left_to_its_workers(
    step: DockerStep, other: SecondDaemon
) -> None:
    lose_worker(step, other.url)
    (step.root / OWNER_FILE).unlink()  # as on a host that has no such directory

    with pytest.raises(ComputeUnavailableError, match=f"{step.root}.*does not share"):
        DockerLauncher(step.compute).recover(step.name, step.handle)
    assert step.containers == []
    assert find(other, step) in ("running", "exited")


def test_where_another_hosts_daemon_has_nothing_any_more_the_step_begins_anew(
    step: DockerStep, other: SecondDaemon
) -> None:
    launch = lose_worker(step, other.url)
    other.cli("rm", "--force", step.name)

    retry = DockerLauncher(step.compute)
    assert not retry.recover(step.name, step.handle)
    assert step.run(launch, retry) == LINES
    assert step.handle.get() is None
