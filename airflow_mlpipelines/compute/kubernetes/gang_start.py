"""Waiting for all pods of a gang: none begins before every one of them has a place."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._units import show_duration
from airflow_mlpipelines.compute.kubernetes.cluster import PATIENCE_SECONDS
from airflow_mlpipelines.compute.kubernetes.detaching import Reason
from airflow_mlpipelines.compute.kubernetes.events import read_warnings
from airflow_mlpipelines.compute.kubernetes.gang import list_pods, node_of
from airflow_mlpipelines.compute.kubernetes.pod import QUEUE_LABEL
from airflow_mlpipelines.compute.kubernetes.starting import (
    StartErrors,
    start_failure,
    timeout_failure,
)
from airflow_mlpipelines.compute.kubernetes.watch import (
    StartTimeoutError,
    find_condition,
    is_over,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.gang import GangSpec, Pods
    from airflow_mlpipelines.exceptions import MLPipelinesError

_PAUSE = 0.3
_LONGEST_PAUSE = 2.0
_SHOWN = 400


class GangStillWaitingError(Exception):
    """The pods, which are all there, have not got as far, and whoever waits has no more time for them."""

    def __init__(self, pods: Pods) -> None:
        self.pods = pods
        super().__init__("still waiting")


def await_pods(
    cluster: Cluster,
    step: str,
    spec: GangSpec,
    done: Callable[[Mapping[str, Any]], bool],
    *,
    is_stopped: Callable[[], bool],
    until: float = math.inf,
    found: Reason | None = None,
) -> Pods:
    """Return the pods of all nodes once each is ``done``, or those that there are once ``is_stopped``.

    Args:
        cluster: The cluster.
        step: The step's name.
        spec: The gang.
        done: Whether a pod has got as far.
        is_stopped: Whether this worker has told the pods to end.
        until: A time of :func:`time.monotonic` after which pods that are all there are waited for no longer.
        found: Why a trigger has called this worker: time that pods have waited before it came.

    Raises:
        GangStillWaitingError: It is time for this worker to do something else.
        StepFailedError: One will never be.
        ComputeUnavailableError: It took too long; the message names the nodes that are missing.
        ClusterError: The API server refuses.
        ClusterLostError: It was away for too long.
    """
    compute = cluster.compute
    began = time.monotonic()
    placed_at: float | None = None
    errors = StartErrors()
    pause = _PAUSE
    while True:
        pods = list_pods(cluster, spec.pod.step_run_id, patience=PATIENCE_SECONDS)
        now = time.monotonic()
        whole = len(pods) == spec.nodes
        if is_stopped() or (whole and all(done(pod) for pod in pods)):
            return pods
        if placed_at is None and whole and all(pod["spec"].get("nodeName") for pod in pods):
            placed_at = now
        waited = now - (began if placed_at is None else placed_at)
        if found in (Reason.HOPELESS, Reason.UNSCHEDULED, Reason.UNSTARTED):
            waited = math.inf
        for pod in pods:
            if not done(pod) and (is_over(pod) or errors.is_hopeless(pod, waited)):
                raise at_node(start_failure(step, pod, spec.pod, compute), pod, spec)
        if placed_at is None and waited > compute.schedule_timeout_seconds:
            raise _no_place(cluster, step, spec, pods)
        if placed_at is not None and waited > compute.startup_timeout_seconds:
            late = next(pod for pod in pods if not done(pod))
            timeout = StartTimeoutError(late, scheduled=True)
            raise at_node(timeout_failure(step, timeout, spec.pod, compute, cluster), late, spec)
        if whole and now > until:
            raise GangStillWaitingError(pods)
        time.sleep(pause)
        pause = min(1.2 * pause, _LONGEST_PAUSE)


def at_node(error: MLPipelinesError, pod: Mapping[str, Any], spec: GangSpec) -> MLPipelinesError:
    """Return the error, saying which node it happened on."""
    machine = pod["spec"].get("nodeName")
    place = f" on {machine}" if machine else ""
    where = f"node {node_of(pod)} of {spec.nodes} (pod {pod['metadata']['name']}{place})"
    if isinstance(error, StepFailedError):
        return error.at(where)
    return ComputeUnavailableError(f"{where}: {error}")


def _no_place(cluster: Cluster, step: str, spec: GangSpec, pods: Pods) -> ComputeUnavailableError:
    compute = cluster.compute
    if len(pods) > spec.nodes:  # somebody has made them, or kept an earlier one
        names = ", ".join(str(pod["metadata"]["name"]) for pod in pods)
        return ComputeUnavailableError(
            f"step {step!r}: it needs {spec.nodes} nodes, and namespace {cluster.namespace!r} has {len(pods)} pods with "
            f"its labels, so that it can't begin: {names}. Delete those that are not of Job {spec.name!r}."
        )
    placed = {node_of(pod) for pod in pods if pod["spec"].get("nodeName")}
    missing = [str(node) for node in range(spec.nodes) if node not in placed]
    waiting = next((pod for pod in pods if node_of(pod) not in placed), None)
    if waiting is not None:
        said = find_condition(waiting, "PodScheduled").get("message", "the scheduler says nothing")
    else:
        job, _ = cluster.find_patiently("jobs", spec.name, patience=PATIENCE_SECONDS)
        said = "its Job is gone" if job is None else _explain_missing_pods(cluster, job)
    return ComputeUnavailableError(
        f"step {step!r}: it needs {spec.nodes} nodes together, and of these {', '.join(missing)} got no place on "
        f"compute {compute.name!r} within {show_duration(compute.schedule_timeout_seconds)} "
        f"(schedule_timeout_seconds): {str(said)[:_SHOWN]}. What the others held was given back. Ask for less (nodes, "
        "cpus, memory, gpus), or wait longer for free nodes."
    )


def _explain_missing_pods(cluster: Cluster, job: Mapping[str, Any]) -> str:
    """Return why the Job has not all of its pods, as far as the cluster tells."""
    if job["spec"].get("suspend"):
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
        return f"it waits in queue {queue!r}" if queue else "it is suspended"
    warnings = read_warnings(cluster, job)
    return warnings[-1] if warnings else "the cluster says nothing"
