"""From a compute's definition to what launches on it. Each launcher is imported when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import Launcher
    from airflow_mlpipelines.definition.graph import ComputeSpec


def make_launcher(compute: ComputeSpec) -> Launcher:
    """Return a launcher for one step run on ``compute``.

    Raises:
        ComputeUnavailableError: Nothing can be launched on it by this release.
    """
    if compute.type == "local":
        from airflow_mlpipelines.compute.local import LocalLauncher

        return LocalLauncher(compute)
    if compute.type == "docker":
        from airflow_mlpipelines.compute.docker import DockerLauncher

        return DockerLauncher(compute)
    if compute.type == "kubernetes":
        from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher

        return KubernetesLauncher(compute)
    raise ComputeUnavailableError(
        f"compute {compute.name!r} is of type {compute.type!r}: this release defines and checks it, but "
        "can't launch steps on it yet. Name a compute of type 'local' or 'docker'."
    )
