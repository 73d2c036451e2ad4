"""A pod keeps the promises of every launcher."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher
from airflow_mlpipelines.compute.kubernetes.pod import DEFAULT_UID
from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
from tests.integration.kubernetes.steps import IMAGE, Look
from tests.unit.compute.launcher_contract import LauncherContract, Workbench
from tests.unit.compute.step_contract import StepBench, StepContract

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
class TestKubernetesLauncher(LauncherContract, StepContract):
    namespace = "default"
    unprivileged_uid = os.getuid() or DEFAULT_UID  # it needs no telling: a pod is never root's

    def make_launcher(self) -> Launcher:
        compute = KubernetesComputeSpec(
            name="cluster", image=IMAGE, namespace=self.namespace, in_cluster=False
        )
        return KubernetesLauncher(compute)

    def find_left(self, step_run_id: str) -> list[str]:
        return Look(self.kubeconfig, self.namespace, step_run_id).remove()

    def touch(self, step_bench: StepBench, name: str) -> None:
        look = Look(self.kubeconfig, self.namespace, step_bench.step_run_id)
        look.execute("touch", f"/mlp/run/{name}")

    def make_bench(self, tmp_path: Path) -> Workbench:
        bench = PodBench(
            tmp_path, self.make_launcher, self.environment, self.make_step_run_id(tmp_path)
        )
        bench.look = Look(self.kubeconfig, self.namespace, bench.step_run_id)
        return bench

    def test_a_large_log_arrives_whole_and_in_order(self, bench: Workbench) -> None:
        # containerd 1.6 now and then drops what is still in the pipe when a program ends, up to 64 KiB of it:
        # the kubelet's own file lacks it. So this program lives on for a moment.
        bench.run(
            "import sys, time\n"
            "sys.stdout.write(''.join('line %d\\n' % i for i in range(200000)))\n"
            "sys.stdout.flush(); time.sleep(2)"
        )
        assert bench.lines == [f"line {i}" for i in range(200_000)]

    @pytest.fixture
    def _nothing_left(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        self.kubeconfig, self.namespace = cluster.kubeconfig, cluster.namespace
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield
        left = Look(cluster.kubeconfig, cluster.namespace, self.make_step_run_id(tmp_path)).remove()
        assert left == []
