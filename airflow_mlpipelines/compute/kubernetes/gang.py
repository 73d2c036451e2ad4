"""A step on several nodes: an indexed Job with a pod for each, and a headless Service by which they are found.

The Job makes the pods, all of one template, and gives each a number and a host name; Kueue, where the cluster
has it, admits all of them or none. Its own restarts are switched off. Job, Service and Secret are named after the
step run, so that there are never two, and Service and Secret belong to the Job.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    UNREACHABLE,
    ClusterError,
    ClusterLostError,
)
from airflow_mlpipelines.compute.kubernetes.detaching import PodWatch
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    KILL_SECONDS,
    adoptable,
    create,
    create_belonging,
    is_of,
    is_waiting,
)
from airflow_mlpipelines.compute.kubernetes.pod import (
    OWNER,
    QUEUE_LABEL,
    label_value,
    owner_reference,
    pod_name,
    secret_manifest,
)
from airflow_mlpipelines.compute.kubernetes.removal import DELETE_SECONDS, Thing, delete_all
from airflow_mlpipelines.compute.kubernetes.volumes import writes_in_place
from airflow_mlpipelines.compute.kubernetes.watch import is_leaving
from airflow_mlpipelines.compute.threads import in_parallel
from airflow_mlpipelines.exceptions import ComputeUnavailableError
from airflow_mlpipelines.runtime.nodes import GANG, TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow_mlpipelines.compute.base import StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.detaching import Awaited
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

Json = dict[str, Any]
Pods = list[dict[str, Any]]
INDEX = "batch.kubernetes.io/job-completion-index"
_TOKEN_BYTES = 32
_KEPT_SECONDS = 3600
"""How long the cluster keeps a Job that has ended while no worker was there."""
_REMOVAL_SECONDS = 60.0
_FORCED_REMOVAL_SECONDS = 15.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class GangSpec:
    """What is asked of the cluster for a step on several nodes.

    Attributes:
        pod: Any of its pods; its name is that of the Job, the Service and the Secret.
        nodes: How many there are.
        job: The Job, without what only this try knows.
    """

    pod: PodSpec
    nodes: int
    job: Json

    @property
    def name(self) -> str:
        """The name of Job, Service and Secret."""
        return self.pod.name


def prepare_launch(launch: StepLaunch, compute: KubernetesComputeSpec) -> StepLaunch:
    """Return ``launch`` with what its pods need to find and to trust each other."""
    name = pod_name(launch.step_run_id)
    told = {
        "hosts": [f"{name}-{node}.{name}" for node in range(launch.nodes)],
        # Files arrive at different times, and images take theirs to be pulled.
        "wait_seconds": compute.startup_timeout_seconds + compute.schedule_timeout_seconds,
    }
    return replace(
        launch,
        env={**launch.env, GANG: json.dumps(told)},
        secrets={**launch.secrets, TOKEN: secrets.token_hex(_TOKEN_BYTES)},
    )


def plan_gang(pod: PodSpec, launch: StepLaunch) -> GangSpec:
    """Return what to ask of the cluster for a launch that :func:`prepare_launch` has prepared, of whose pods ``pod`` is any."""
    meta = pod.manifest["metadata"]
    queue = {key: value for key, value in meta["labels"].items() if key == QUEUE_LABEL}
    labels = {key: value for key, value in meta["labels"].items() if key not in queue}
    template = {**pod.manifest["spec"], "subdomain": pod.name}
    job: Json = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": pod.name,
            "labels": {**labels, **queue},  # it is the Job that waits in a queue, with all its pods
            "annotations": meta["annotations"],
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": launch.nodes,
            "parallelism": launch.nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "template": {
                "metadata": {"labels": labels, "annotations": meta["annotations"]},
                "spec": template,
            },
        },
    }
    return GangSpec(pod=pod, nodes=launch.nodes, job=job)


def create_gang(cluster: Cluster, spec: GangSpec, token: str) -> Json:
    """Return the Job, made now. ``token`` is a word that only this try knows.

    Raises:
        ClusterError: The cluster refuses.
        ClusterLostError: It does not answer.
        ComputeUnavailableError: The name belongs to a Job of somebody else.
    """
    meta = spec.job["metadata"]
    owned = {**meta, "annotations": {**meta["annotations"], OWNER: token}}
    body = {**spec.job, "metadata": owned}

    def clear(found: Mapping[str, Any]) -> None:
        if not is_of(found, spec.pod.step_run_id):
            raise ComputeUnavailableError(
                f"The name {spec.name!r} is taken by another Job in namespace {cluster.namespace!r}."
            )
        remove_gang(cluster, spec.pod.step_run_id)

    return create(cluster, "jobs", body, token=token, clear=clear)


def create_belongings(cluster: Cluster, spec: GangSpec, job: Mapping[str, Any]) -> None:
    """Make the Job's Service and Secret.

    Raises:
        ClusterError: The cluster refuses.
        ClusterLostError: It does not answer.
    """
    meta = {
        "name": spec.name,
        "labels": {STEP_RUN_LABEL: label_value(spec.pod.step_run_id)},
        "ownerReferences": [owner_reference({"apiVersion": "batch/v1", "kind": "Job", **job})],
    }
    service: Json = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {
            "clusterIP": "None",
            "selector": {STEP_RUN_LABEL: label_value(spec.pod.step_run_id)},
            "publishNotReadyAddresses": True,  # they look for each other before they are ready
        },
    }
    secret = secret_manifest(spec.pod, {"apiVersion": "batch/v1", "kind": "Job", **job})
    create_belonging(cluster, "services", service)
    create_belonging(cluster, "secrets", secret)


def list_pods(cluster: Cluster, step_run_id: str, *, patience: float | None = None) -> Pods:
    """Return the pods of a step run's nodes, by node.

    Args:
        cluster: The cluster.
        step_run_id: Whose they are.
        patience: Seconds that the API server may be away; None where that is an error at once.

    Raises:
        ClusterError: The API server refuses, or, without ``patience``, does not answer.
        ClusterLostError: It was away for longer than that.
    """
    selector = f"{STEP_RUN_LABEL}={label_value(step_run_id)},{INDEX}"
    query = {"labelSelector": selector}
    if patience is None:
        found: Pods = cluster.ask("GET", "pods", query=query)["items"]
    else:
        found = cluster.ask_patiently("GET", "pods", query=query, patience=patience)["items"]
    return sorted(found, key=node_of)


def node_of(pod: Mapping[str, Any]) -> int:
    """Return the number of the node that the pod is."""
    return int(pod["metadata"]["labels"][INDEX])


def find_gang(
    cluster: Cluster, step_run_id: str, noted: str | None, *, waits: bool = False
) -> Pods | None:
    """Return all pods of an earlier worker's gang, to go on with them; else remove what is there of it.

    Args:
        cluster: The cluster.
        step_run_id: Whose gang it should be.
        noted: The ``uid`` of the Job that an earlier worker noted.
        waits: Whether it was left to itself: then pods that wait for their files are of use.

    Raises:
        ClusterError: The API server refuses.
        ClusterLostError: It does not answer.
        ComputeUnavailableError: Something stays.
    """
    name = pod_name(step_run_id)
    job, _ = cluster.find_patiently("jobs", name, patience=PATIENCE_SECONDS)
    pods = list_pods(cluster, step_run_id, patience=PATIENCE_SECONDS)
    if job is None and pods:
        # Of a node that does not answer: it outlives its Job, and would be counted among the next one's pods.
        remove_gang(cluster, step_run_id)
    if job is None or not is_of(job, step_run_id):
        return None
    uid = job["metadata"]["uid"]
    is_whole = [node_of(pod) for pod in pods] == list(range(job["spec"]["completions"]))
    if (
        is_whole
        and not is_leaving(job)
        and noted in (None, uid)
        and all(_is_of_use(pod, step_run_id, noted=noted is not None, waits=waits) for pod in pods)
    ):
        return pods
    remove_gang(cluster, step_run_id)
    return None


def _is_of_use(pod: Mapping[str, Any], step_run_id: str, *, noted: bool, waits: bool) -> bool:
    uid = pod["metadata"]["uid"]
    if adoptable(pod, step_run_id, uid if noted else None):
        return True
    return waits and is_waiting(pod, step_run_id, uid)


def discard_gang(
    cluster: Cluster,
    step_run_id: str,
    *,
    seconds: int = KILL_SECONDS,
    patience: float = DELETE_SECONDS,
) -> None:
    """Have all of a gang deleted, without waiting for it: its processes get ``seconds`` to end.

    Raises:
        ClusterError: The cluster refuses, or did not answer for ``patience`` seconds.
    """
    name = pod_name(step_run_id)
    try:
        pods = list_pods(cluster, step_run_id, patience=patience)
    except ClusterLostError as error:
        raise ClusterError(UNREACHABLE, str(error)) from error

    def delete(pod: Mapping[str, Any]) -> None:
        thing = Thing("pods", str(pod["metadata"]["name"]), seconds=seconds)
        delete_all(cluster.again(), [thing], patience=patience)

    try:
        in_parallel(delete, pods)  # before the Job, with which they would go in their own time
    finally:
        rest = [Thing(kind, name) for kind in ("jobs", "services", "secrets")]
        delete_all(cluster, rest, patience=patience)


def remove_gang(cluster: Cluster, step_run_id: str) -> None:
    """Delete all of a gang, and wait until it is gone.

    Pods whose node does not answer are taken out of the cluster's books after a minute, as a single one is by
    :func:`~airflow_mlpipelines.compute.kubernetes.lifetime.remove_pod`: not if they have a volume that others have
    as well.

    Raises:
        ClusterError: The cluster does not answer.
        ComputeUnavailableError: Something stays.
    """
    discard_gang(cluster, step_run_id)
    if await_gang_removal(cluster, step_run_id, seconds=_REMOVAL_SECONDS):
        return
    force_gang(cluster, step_run_id)
    if not await_gang_removal(cluster, step_run_id, seconds=_FORCED_REMOVAL_SECONDS):
        raise ComputeUnavailableError(
            f"The pods of Job {pod_name(step_run_id)!r} in namespace {cluster.namespace!r} can't be removed; a "
            "finalizer may hold them."
        )


def force_gang(cluster: Cluster, step_run_id: str) -> None:
    """Take what is left of a gang, which has been told to go, out of the cluster's books, without waiting for it.

    Raises:
        ClusterError: The cluster does not answer.
        ComputeUnavailableError: One of its pods may still write to a shared volume.
    """
    writing = [pod for pod in list_pods(cluster, step_run_id) if writes_in_place(pod)]
    if writing:
        names = ", ".join(repr(pod["metadata"]["name"]) for pod in writing)
        raise ComputeUnavailableError(
            f"Of Job {pod_name(step_run_id)!r} in namespace {cluster.namespace!r} these pods do not end, and may still "
            f"write to a shared volume: {names}. Do their nodes answer? If a node is lost, remove it from the "
            "cluster (kubectl delete node)."
        )
    discard_gang(cluster, step_run_id, seconds=0)


def await_gang_removal(cluster: Cluster, step_run_id: str, *, seconds: float) -> bool:
    """Return whether the Job and all of its pods are gone within ``seconds``."""
    deadline = time.monotonic() + seconds
    name = pod_name(step_run_id)
    while time.monotonic() < deadline:
        try:
            if not list_pods(cluster, step_run_id) and cluster.find("jobs", name) is None:
                return True
        except ClusterError:
            pass
        time.sleep(_POLL_SECONDS)
    return False


def watch_gang(
    spec: GangSpec,
    compute: KubernetesComputeSpec,
    pods: Iterable[Mapping[str, Any]],
    awaits: Awaited,
) -> PodWatch:
    """Return what a trigger has to know of a gang's pods, but for the step's time and the logs."""
    return PodWatch(
        compute=compute.name,
        namespace=compute.namespace,
        conn_id=compute.conn_id,
        in_cluster=compute.in_cluster,
        selector=f"{STEP_RUN_LABEL}={label_value(spec.pod.step_run_id)}",
        pods={str(pod["metadata"]["name"]): str(pod["metadata"]["uid"]) for pod in pods},
        secret=spec.name,
        awaits=awaits,
        schedule_seconds=compute.schedule_timeout_seconds,
        startup_seconds=compute.startup_timeout_seconds,
        timeout_seconds=None,
        job=spec.name,
    )
