"""Making a step's pod, finding it again, and removing it: never two of them, and nothing left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.compute.kubernetes.cluster import (
    CONFLICT,
    PATIENCE_SECONDS,
    ClusterError,
    ClusterLostError,
)
from airflow_mlpipelines.compute.kubernetes.pod import (
    OWNER,
    STAGE,
    STEP,
    label_value,
    secret_manifest,
)
from airflow_mlpipelines.compute.kubernetes.removal import DELETE_SECONDS, Thing, delete_all
from airflow_mlpipelines.compute.kubernetes.volumes import has_helpers, writes_in_place
from airflow_mlpipelines.compute.kubernetes.watch import (
    ENDED_PHASES,
    await_removal,
    container_state,
    is_leaving,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec

Json = dict[str, Any]
KILL_SECONDS = 2
"""What a program has to end by itself. Airflow leaves five seconds for everything."""
_REMOVAL_SECONDS = 60.0
_FORCED_REMOVAL_SECONDS = 15.0
_PAUSE = 1.0


def create_pod(cluster: Cluster, spec: PodSpec, token: str) -> Mapping[str, Any]:
    """Return the pod, made now. ``token`` is a word that only this try knows.

    Raises:
        ClusterError: The cluster refuses.
        ClusterLostError: It does not answer.
        ComputeUnavailableError: The name belongs to a pod of somebody else.
    """
    meta = spec.manifest["metadata"]
    owned = {**meta, "annotations": {**meta.get("annotations", {}), OWNER: token}}
    body = {**spec.manifest, "metadata": owned}

    def clear(found: Mapping[str, Any]) -> None:
        if not is_of(found, spec.step_run_id):
            raise ComputeUnavailableError(
                f"The name {spec.name!r} is taken by another pod in namespace {cluster.namespace!r}."
            )
        remove_pod(cluster, found)

    return create(cluster, "pods", body, token=token, clear=clear)


def create(
    cluster: Cluster,
    kind: str,
    body: Json,
    *,
    token: str,
    clear: Callable[[Mapping[str, Any]], None],
) -> Json:
    """Return the object, made now, or by a request before of which the answer was lost.

    Args:
        cluster: The cluster.
        kind: Such as ``pods``.
        body: The object, at which ``token`` is noted.
        token: A word that only this try knows.
        clear: Removes another object that has its name, or raises.

    Raises:
        ClusterError: The cluster refuses.
        ClusterLostError: It does not answer.
    """
    name = str(body["metadata"]["name"])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return cluster.ask("POST", kind, body=body)
        except ClusterError as error:
            if error.status == CONFLICT:
                found, _ = cluster.find_patiently(kind, name, patience=PATIENCE_SECONDS)
                if found is not None and belongs_to(found, token):
                    return found
                if found is not None:
                    clear(found)
            elif not error.may_pass:
                raise
            if time.monotonic() > deadline:
                raise ClusterLostError(str(error)) from error
            time.sleep(_PAUSE)


def create_secret(cluster: Cluster, spec: PodSpec, pod: Mapping[str, Any]) -> None:
    """Make the Secret with the step's secrets, which belongs to its pod.

    Raises:
        ClusterError: The cluster refuses.
        ClusterLostError: It does not answer.
    """
    create_belonging(cluster, "secrets", secret_manifest(spec, pod))


def create_belonging(cluster: Cluster, kind: str, body: Json) -> None:
    """Make what belongs to a pod or a Job made now; something else of its name goes first.

    That is of an earlier pod, and not yet cleared away; or it is this very thing, and the answer was lost. It takes
    no right to read Secrets to do without knowing.

    Raises:
        ClusterError: The cluster refuses.
        ClusterLostError: It does not answer.
    """

    def make() -> None:
        try:
            cluster.ask("POST", kind, body=body)
        except ClusterError as error:
            if error.status != CONFLICT:
                raise
            cluster.delete(kind, str(body["metadata"]["name"]), seconds=0)
            cluster.ask("POST", kind, body=body)

    cluster.patiently(make)


def discard(
    cluster: Cluster,
    spec: PodSpec,
    pod: Mapping[str, Any],
    *,
    seconds: int,
    patience: float = DELETE_SECONDS,
) -> None:
    """Have the pod and its Secret deleted, without waiting for it.

    Raises:
        ClusterError: The cluster refuses, or did not answer for ``patience`` seconds.
    """
    things = [Thing("pods", spec.name, uid=pod["metadata"]["uid"], seconds=seconds)]
    if has_secret(pod):
        things.append(Thing("secrets", spec.name))
    delete_all(cluster, things, patience=patience)


def remove_pod(cluster: Cluster, pod: Mapping[str, Any]) -> None:
    """Delete the pod, and wait until it is gone.

    One whose node does not answer is taken out of the cluster's books after a minute: whatever still runs there makes
    nothing that counts, as a worker has to fetch it, or to ask the pod's agent to commit it. Not so if it has a
    volume that others have as well.

    Raises:
        ClusterError: The cluster does not answer.
        ComputeUnavailableError: It stays.
    """
    meta = pod["metadata"]
    name, uid = str(meta["name"]), str(meta["uid"])
    cluster.delete("pods", name, seconds=KILL_SECONDS, uid=uid)
    if await_removal(cluster, name, uid, seconds=_REMOVAL_SECONDS):
        return
    if writes_in_place(pod):
        raise ComputeUnavailableError(
            f"The pod {name!r} in namespace {cluster.namespace!r} does not end, and may still write to a shared volume. "
            "Does its node answer? If the node is lost, remove it from the cluster (kubectl delete node)."
        )
    cluster.delete("pods", name, seconds=0, uid=uid)
    if not await_removal(cluster, name, uid, seconds=_FORCED_REMOVAL_SECONDS):
        raise ComputeUnavailableError(
            f"The pod {name!r} in namespace {cluster.namespace!r} can't be removed; a finalizer may hold it."
        )


def take_over(cluster: Cluster, kind: str, name: str, token: str) -> Json:
    """Note that this try owns the pod or Job from now on, so that none before it kills it; return it as it is then.

    Raises:
        ClusterError: The cluster refuses.
        ClusterLostError: It does not answer.
    """
    body = {"metadata": {"annotations": {OWNER: token}}}
    return cluster.ask_patiently("PATCH", f"{kind}/{name}", body=body)


def adoptable(pod: Mapping[str, Any], step_run_id: str, noted: str | None) -> bool:
    """Return whether a new try goes on with this pod.

    One whose step has ended is adopted only while the handle says that nobody has read its end; one that
    never got all of its files is begun anew.

    Args:
        pod: As the cluster has it.
        step_run_id: Whose pod it should be.
        noted: The ``uid`` of the pod that an earlier try noted.
    """
    if not is_of(pod, step_run_id) or is_leaving(pod):
        return False
    if has_helpers(pod) and pod.get("status", {}).get("phase") in ENDED_PHASES:
        return False
    if not has_files(pod):
        return False
    uid = pod["metadata"]["uid"]
    if container_state(pod, STEP)[0] == "terminated":
        return bool(noted == uid)
    return noted in (None, uid)


def is_waiting(pod: Mapping[str, Any], step_run_id: str, noted: str | None) -> bool:
    """Return whether this very pod waits for its files: its place in the cluster's queue is not given up."""
    if not is_of(pod, step_run_id) or is_leaving(pod) or pod["metadata"]["uid"] != noted:
        return False
    is_ended = pod.get("status", {}).get("phase") in ENDED_PHASES
    return not is_ended and container_state(pod, STAGE)[0] != "terminated"


def has_files(pod: Mapping[str, Any]) -> bool:
    """Return whether the pod has got all of its files, or has no need of any."""
    if not has_helpers(pod):
        return True
    state, facts = container_state(pod, STAGE)
    return state == "terminated" and facts.get("exitCode") == 0


def is_of(pod: Mapping[str, Any], step_run_id: str) -> bool:
    """Return whether the pod is one of this step run's."""
    labels = pod["metadata"].get("labels") or {}
    return bool(labels.get(STEP_RUN_LABEL) == label_value(step_run_id))


def belongs_to(pod: Mapping[str, Any], token: str) -> bool:
    """Return whether the try with this token made the pod, or adopted it last."""
    annotations = pod["metadata"].get("annotations") or {}
    return bool(annotations.get(OWNER) == token)


def has_secret(pod: Mapping[str, Any]) -> bool:
    """Return whether the pod refers to a Secret of its own name."""
    name, spec = pod["metadata"]["name"], pod["spec"]
    mounted = (
        (volume.get("secret") or {}).get("secretName") for volume in spec.get("volumes") or ()
    )
    sources = (
        ((variable.get("valueFrom") or {}).get("secretKeyRef") or {}).get("name")
        for container in spec["containers"]
        for variable in container.get("env") or ()
    )
    pulled_with = (item.get("name") for item in spec.get("imagePullSecrets") or ())
    return name in mounted or name in sources or name in pulled_with
