from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.local import LocalLauncher
from airflow_mlpipelines.definition.graph import LocalComputeSpec
from tests.unit.compute.launcher_contract import LauncherContract

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import Launcher


class TestLocalLauncher(LauncherContract):
    def make_launcher(self) -> Launcher:
        return LocalLauncher(LocalComputeSpec(name="local"))
