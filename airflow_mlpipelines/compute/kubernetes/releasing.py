"""Taking from the cluster what it still has of a step run of which nothing is needed any more."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import LABEL_PREFIX
from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError, connect
from airflow_mlpipelines.compute.kubernetes.gang import discard_gang
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    KILL_SECONDS,
    belongs_to,
    has_secret,
    is_of,
)
from airflow_mlpipelines.compute.kubernetes.pod import pod_name
from airflow_mlpipelines.compute.kubernetes.removal import DELETE_SECONDS, Thing, delete_all
from airflow_mlpipelines.compute.kubernetes.watch import ENDED_PHASES, is_leaving
from airflow_mlpipelines.compute.sites import LAUNCH
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

log = logging.getLogger(__name__)

_JANITOR_SECONDS = 2.0
"""How long a deletion is tried by who only clears up, and may do so again in the next run."""


@dataclass(frozen=True)
class Owned:
    """By what a try knows the pod, or the Job, that is its own to remove: by either of these.

    Attributes:
        token: The word that is at those which it has made or adopted.
        pod: The ``uid`` of the pod that was noted by an earlier worker, or this one.
        job: The ``uid`` of such a Job.
        is_gang: Whether it is a Job.
    """

    token: str
    pod: str | None = None
    job: str | None = None
    is_gang: bool = False

    def includes(self, found: Mapping[str, Any]) -> bool:
        """Return whether it is this one."""
        uid = found["metadata"]["uid"]
        return belongs_to(found, self.token) or uid in (self.pod, self.job)


def remove_owned(cluster: Cluster, step_run_id: str, owned: Owned) -> bool:
    """Return whether nothing of a step run is left, or all was told to go; not if another try has adopted it.

    Raises:
        ClusterError: The cluster refuses, or did not answer for some seconds.
        ClusterLostError: So too.
    """
    name, kind = pod_name(step_run_id), "jobs" if owned.is_gang else "pods"
    found, _ = cluster.find_patiently(kind, name, patience=DELETE_SECONDS)
    if found is None or not is_of(found, step_run_id):
        return True
    if not owned.includes(found):
        return False
    if owned.is_gang:
        discard_gang(cluster, step_run_id)
    elif not is_leaving(found):
        _delete_pod(cluster, found, patience=DELETE_SECONDS)
    return True


def remove_left(
    compute: KubernetesComputeSpec, step_run_id: str, *, word: str, is_gang: bool, only_ended: bool
) -> bool:
    """Return whether nothing is left of a step run's launch with this ``word``, or all of it was told to go.

    Args:
        compute: The compute.
        step_run_id: Whose launch it was.
        word: Nothing that bears another one is touched.
        is_gang: Whether it is a Job.
        only_ended: Whether what may still run is left alone; of a Job, the cluster removes what has ended.

    Raises:
        ComputeUnavailableError: The cluster does not answer, or refuses.
    """
    cluster, name = connect(compute), pod_name(step_run_id)
    try:
        found = cluster.find("jobs" if is_gang else "pods", name)
        if found is None or not _bears(found, word):
            return True
        if only_ended and found.get("status", {}).get("phase") not in ENDED_PHASES:
            return False
        log.info(
            "Removing %s, which a step run that is over has left in %s", name, cluster.namespace
        )
        if is_gang:
            discard_gang(cluster, step_run_id, patience=_JANITOR_SECONDS)
        else:
            _delete_pod(cluster, found, patience=_JANITOR_SECONDS)
    except ClusterError as error:
        raise ComputeUnavailableError(
            f"compute {compute.name!r}: {name} in namespace {cluster.namespace!r}: {error}"
        ) from error
    return True


def _delete_pod(cluster: Cluster, pod: Mapping[str, Any], *, patience: float) -> None:
    meta = pod["metadata"]
    things = [Thing("pods", meta["name"], uid=meta["uid"], seconds=KILL_SECONDS)]
    if has_secret(pod):
        things.append(Thing("secrets", meta["name"]))
    delete_all(cluster, things, patience=patience)


def _bears(found: Mapping[str, Any], word: str) -> bool:
    labels = found["metadata"].get("labels") or {}
    return bool(labels.get(f"{LABEL_PREFIX}{LAUNCH}") == word)
