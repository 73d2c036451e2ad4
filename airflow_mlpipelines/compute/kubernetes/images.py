"""Images of pods: a tag is looked up in its registry when a run starts, and pods run what it meant then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.images import (
    ImageIdentity,
    ImageName,
    repository_of,
    resolve_image,
)
from airflow_mlpipelines.compute.registries import look_up_image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.compute.base import ResolvedEnvironment
    from airflow_mlpipelines.definition.graph import EnvironmentSpec, KubernetesComputeSpec


def find_image(name: str, compute: KubernetesComputeSpec) -> ImageIdentity:
    """Return what ``name`` stands for in its registry at this moment; where that can't be known, the reason."""
    registry = compute.registry
    conn_ids = [compute.image_conn_id, registry.conn_id if registry is not None else None]
    insecure = (
        {ImageName.parse(registry.url).registry}
        if registry is not None and registry.insecure
        else set()
    )
    return look_up_image(
        name, conn_ids=[conn_id for conn_id in conn_ids if conn_id], insecure=insecure
    )


def recall_image(name: str, digest: str) -> ImageIdentity:
    """Return the image that ``name`` stood for when its digest was taken."""
    return ImageIdentity(f"{repository_of(name)}@{digest}", digest)


def recall_environment(
    environment: EnvironmentSpec | None, description: Mapping[str, Any]
) -> ResolvedEnvironment | None:
    """Return the environment that a run was planned with; None if its digest was not known then."""
    name, digest = str(description.get("image")), description.get("digest")
    if digest is None:
        return None
    return resolve_image(name, recall_image(name, digest), environment)
