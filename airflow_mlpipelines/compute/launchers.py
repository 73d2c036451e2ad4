"""From a compute's definition to what launches on it. Each launcher is imported when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import BuildGuard, Launcher
    from airflow_mlpipelines.definition.graph import ComputeSpec


def make_launcher(compute: ComputeSpec, *, build_guard: BuildGuard | None = None) -> Launcher:
    """Return a launcher for one step run on ``compute``.

    Args:
        compute: The compute.
        build_guard: Keeps other machines from building the same images meanwhile.
    """
    launcher = _make_launcher(compute)
    launcher.build_guard = build_guard
    return launcher


def _make_launcher(compute: ComputeSpec) -> Launcher:
    if compute.type == "local":
        from airflow_mlpipelines.compute.local import LocalLauncher

        return LocalLauncher(compute)
    if compute.type == "docker":
        from airflow_mlpipelines.compute.docker import DockerLauncher

        return DockerLauncher(compute)
    from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher

    return KubernetesLauncher(compute)
