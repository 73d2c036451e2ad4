"""Waiting for room in a namespace's quota: a while with a worker, then without one."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._units import show_duration
from airflow_mlpipelines.compute.base import DetachedError
from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodWatch
from airflow_mlpipelines.compute.kubernetes.pod import label_value
from airflow_mlpipelines.compute.kubernetes.refusals import find_shortage
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.base import StepLaunch
    from airflow_mlpipelines.compute.kubernetes.relaunch import PodNote
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

log = logging.getLogger(__name__)

_SHOWN = 600
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 10.0
_LEFT_SECONDS = (30.0, 300.0)
"""How long a step is left alone before a worker tries again, at least and at most: a quarter of its wait so far."""


def make_when_room(
    make: Callable[[], Mapping[str, Any]],
    launch: StepLaunch,
    compute: KubernetesComputeSpec,
    *,
    note: PodNote,
    until: float,
    is_stopped: Callable[[], bool],
) -> Mapping[str, Any] | None:
    """Return what ``make`` has made of the cluster's, or None once ``is_stopped``.

    Where a quota has no room for it now, it is made as soon as there is some.

    Args:
        make: Makes a pod or a Job, or raises :class:`~.cluster.ClusterError`.
        launch: The step run that it is for.
        compute: Where it is made; its ``schedule_timeout_seconds`` counts from the first time that there was no room.
        note: Remembers that time for the worker that tries again.
        until: A time of :func:`time.monotonic` after which it is waited without a worker.
        is_stopped: Whether somebody has stopped the step.

    Raises:
        DetachedError: The wait goes on without this worker.
        ComputeUnavailableError: There was no room in time.
        ClusterError: The cluster refuses, also because there never will be room.
    """
    pause = _FIRST_PAUSE
    while True:
        try:
            return make()
        except ClusterError as error:
            shortage = find_shortage(error)
            if shortage is None or shortage.too_large is not None:
                raise
            said = str(error)[:_SHOWN]
        if is_stopped():
            return None
        now = time.time()
        if note.queued_at is None:
            log.info(
                "Waiting for room in quota %r of namespace %s: %s",
                shortage.quota,
                compute.namespace,
                said,
            )
            note.queue(now)
        waited = now - (note.queued_at or now)
        if waited > compute.schedule_timeout_seconds:
            note.forget()
            raise ComputeUnavailableError(
                f"step {launch.step_name!r}: quota {shortage.quota!r} of namespace {compute.namespace!r} had no room for "
                f"it within {show_duration(compute.schedule_timeout_seconds)} (schedule_timeout_seconds): {said}. Wait "
                "longer, ask for less, or have the quota raised."
            )
        if time.monotonic() > until:
            log.info("The step waits for room without a worker")
            raise DetachedError(_watch(launch, compute, waited).to_dict())
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)


def _watch(launch: StepLaunch, compute: KubernetesComputeSpec, waited: float) -> PodWatch:
    """Return what a trigger has to know of a step without pods."""
    least, most = _LEFT_SECONDS
    left = max(compute.schedule_timeout_seconds - waited, 0.0) + 1.0
    return PodWatch(
        compute=compute.name,
        namespace=compute.namespace,
        conn_id=compute.conn_id,
        in_cluster=compute.in_cluster,
        selector=f"{STEP_RUN_LABEL}={label_value(launch.step_run_id)}",
        pods={},
        secret=None,
        awaits=Awaited.ROOM,
        schedule_seconds=compute.schedule_timeout_seconds,
        startup_seconds=compute.startup_timeout_seconds,
        timeout_seconds=launch.timeout_seconds,
        pause_seconds=min(max(waited / 4, least), most, left),
    )
