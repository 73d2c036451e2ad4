"""What a node pulls a pod's images with: the credentials of the worker's own connections, in the pod's Secret.

The Secret is the one that the step's secrets are in, so that it comes and goes with the pod.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.images import ImageName
from airflow_mlpipelines.compute.kubernetes.pod import DOCKER_CONFIG
from airflow_mlpipelines.compute.registries import make_docker_config, read_login
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.compute.registries import Login
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

log = logging.getLogger(__name__)


def image_conn_ids(compute: KubernetesComputeSpec) -> list[str]:
    """Return the Airflow connections with which a compute's images are looked up, built and pulled."""
    own = compute.registry.conn_id if compute.registry is not None else None
    return [conn_id for conn_id in (own, compute.image_conn_id) if conn_id is not None]


def add_pull_secret(spec: PodSpec, compute: KubernetesComputeSpec) -> PodSpec:
    """Return the pod with the credentials that its images need, where the compute names no ``image_pull_secrets``.

    No other registry's go along. Where a connection can't be read, the node has to know by itself.
    """
    if compute.image_pull_secrets:
        return spec
    registries = {ImageName.parse(image).registry for image in _images(spec.manifest)}
    logins = [login for login in _logins(compute) if login.registry in registries]
    if not logins:
        return spec
    spec.manifest["spec"]["imagePullSecrets"] = [{"name": spec.name}]
    return replace(spec, documents={**spec.documents, DOCKER_CONFIG: make_docker_config(logins)})


def _images(manifest: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("initContainers", "containers"):
        for container in manifest["spec"].get(kind, ()):
            yield container["image"]


def _logins(compute: KubernetesComputeSpec) -> Iterator[Login]:
    for conn_id in image_conn_ids(compute):
        try:
            yield read_login(conn_id)
        except ComputeUnavailableError as error:
            log.warning("Nodes get no credentials for images: %s", error)
