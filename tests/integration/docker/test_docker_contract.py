"""A container keeps the promises of every launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.definition.graph import DockerComputeSpec
from tests.integration.docker.conftest import IMAGE, remove_containers
from tests.unit.compute.launcher_contract import LauncherContract
from tests.unit.compute.step_contract import StepContract, unprivileged_uid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_mlpipelines.compute.base import Launcher


@pytest.mark.docker
class TestDockerLauncher(LauncherContract, StepContract):
    unprivileged_uid = unprivileged_uid()

    def make_launcher(self) -> Launcher:
        return DockerLauncher(DockerComputeSpec(name="docker", image=IMAGE))

    def make_unprivileged_launcher(self) -> Launcher:
        user = str(self.unprivileged_uid)
        return DockerLauncher(DockerComputeSpec(name="docker", image=IMAGE, user=user))

    def find_left(self, step_run_id: str) -> list[str]:
        return remove_containers(step_run_id)

    @pytest.fixture(autouse=True)
    def _nothing_left(self, image: str, tmp_path: Path) -> Iterator[None]:
        assert image == IMAGE
        yield
        left = remove_containers(self.make_step_run_id(tmp_path))
        assert left == []
