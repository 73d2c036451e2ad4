"""A pod keeps the promises of every launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher
from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
from tests.integration.kubernetes.steps import IMAGE, Look
from tests.unit.compute.launcher_contract import LauncherContract, Workbench

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_mlpipelines.compute.base import Launcher


class PodBench(Workbench):
    """A workbench whose programs run in a pod: they share no file with the tests."""

    look: Look

    def touch(self, name: str) -> None:
        if self.look.is_running():
            self.look.execute("touch", f"/mlp/run/{name}")
        else:
            super().touch(name)

    def is_quiet(self) -> bool:
        return not self.look.is_running() and super().is_quiet()


@pytest.mark.kubernetes
@pytest.mark.usefixtures("_nothing_left")
class TestKubernetesLauncher(LauncherContract):
    namespace = "default"

    def make_launcher(self) -> Launcher:
        compute = KubernetesComputeSpec(
            name="cluster", image=IMAGE, namespace=self.namespace, in_cluster=False
        )
        return KubernetesLauncher(compute)

    def make_bench(self, tmp_path: Path) -> Workbench:
        bench = PodBench(
            tmp_path, self.make_launcher, self.environment, self.make_step_run_id(tmp_path)
        )
        bench.look = Look(self.kubeconfig, self.namespace, bench.step_run_id)
        return bench

    @pytest.fixture
    def _nothing_left(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        self.kubeconfig, self.namespace = cluster.kubeconfig, cluster.namespace
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield
        left = Look(cluster.kubeconfig, cluster.namespace, self.make_step_run_id(tmp_path)).remove()
        assert left == []
