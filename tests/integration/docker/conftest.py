"""Steps on a real Docker daemon, each test with a name of its own and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.base import Stage, StepLaunch
from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.definition.graph import DockerComputeSpec, ResourcesSpec
from airflow_mlpipelines.execution.handles import FileHandle
from tests.integration.docker.cli import docker_cli, wait_until
from tests.integration.docker.registry import registry
from tests.parts import missing, require_docker

__all__ = ["docker_cli", "registry", "wait_until"]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

IMAGE = "python:3.11-slim"


def find_containers(step_run_id: str) -> list[str]:
    """Return the ids of all containers of a step run, alive or not."""
    label = f"label=airflow-mlpipelines.step_run={step_run_id}"
    return docker_cli("ps", "-a", "--no-trunc", "-q", "--filter", label).split()


def remove_containers(step_run_id: str) -> list[str]:
    """Remove what a test has left, and return it."""
    left = find_containers(step_run_id)
    if left:
        docker_cli("rm", "-f", "-v", *left)
    return left


@dataclass
class DockerStep:
    """One step run: its directories, and every container and process that a test makes for it."""

    root: Path
    name: str = field(default_factory=lambda: f"mlp-test-{uuid.uuid4().hex[:12]}")
    compute: DockerComputeSpec = field(
        default_factory=lambda: DockerComputeSpec(name="d", image=IMAGE)
    )
    lines: list[str] = field(default_factory=list)
    workers: list[BaseProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("code", "runtime", "run", "outputs", "inputs"):
            (self.root / name).mkdir()
        self.data = self.root / "inputs" / "table.csv"
        self.data.write_text("a,b\n1,2\n")
        self.handle = FileHandle(self.root / "handle.json")

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
            "labels": {"dag_id": "flights", "task_id": "train"},
        }
        return StepLaunch(**fields | changes)

    def python(self, program: str, **changes: Any) -> StepLaunch:
        return self.launch("python3", "-c", program, **changes)

    def run(self, launch: StepLaunch, launcher: DockerLauncher | None = None) -> list[str]:
        """Run the step here and return its lines."""
        launcher = launcher or DockerLauncher(self.compute)
        launcher.run(launch, emit=self.lines.append, handle=self.handle)
        return self.lines

    def run_in_thread(
        self, launch: StepLaunch
    ) -> tuple[DockerLauncher, threading.Thread, list[Any]]:
        """Run the step beside the test; the list gets the error it ended in, or None."""
        launcher = DockerLauncher(self.compute)
        ended: list[Any] = []

        def work() -> None:
            try:
                self.run(launch, launcher)
                ended.append(None)
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                ended.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return launcher, thread, ended

    def run_in_worker(self, launch: StepLaunch) -> BaseProcess:
        """Run the step in a process that can be killed like a worker; its log goes to a file."""

        def work() -> None:
            with (self.root / "worker.log").open("w", buffering=1) as file:
                DockerLauncher(self.compute).run(
                    launch, emit=lambda line: print(line, file=file), handle=self.handle
                )

        worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        worker.start()
        self.workers.append(worker)
        return worker

    @property
    def worker_log(self) -> str:
        path = self.root / "worker.log"
        return path.read_text() if path.exists() else ""

    @property
    def containers(self) -> list[str]:
        """Every container of this step run, alive or not."""
        return find_containers(self.name)

    def inspect(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(docker_cli("inspect", self.name) or "[]")
        return found[0] if found else {}

    @property
    def status(self) -> str:
        return str(self.inspect().get("State", {}).get("Status", "gone"))

    def clean(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        remove_containers(self.name)


@pytest.fixture(autouse=True)
def _own_gpu_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPELINES_GPU_LOCKS", str(tmp_path / "gpu-locks"))


@pytest.fixture(scope="session")
def image() -> str:
    require_docker()
    if not docker_cli("images", "-q", IMAGE):
        missing(f"the Docker daemon has no image {IMAGE} (.ci/python-image.sh makes one)")
    return IMAGE


@pytest.fixture
def step(image: str, tmp_path: Path) -> Iterator[DockerStep]:
    assert image
    made = DockerStep(tmp_path)
    try:
        yield made
    finally:
        made.clean()
