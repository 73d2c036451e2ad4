"""What a worker does beside a step's pod: waits for it, hands on its log, or leaves it to itself."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import DetachedError
from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.compute.kubernetes.cluster import PATIENCE_SECONDS, ClusterError
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodNews, PodWatch, Reason
from airflow_mlpipelines.compute.kubernetes.lifetime import KILL_SECONDS, has_secret
from airflow_mlpipelines.compute.kubernetes.logs import LogFollower
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, STEP, label_value
from airflow_mlpipelines.compute.kubernetes.relay import RunFileRelay
from airflow_mlpipelines.compute.kubernetes.starting import (
    StartErrors,
    start_failure,
    timeout_failure,
)
from airflow_mlpipelines.compute.kubernetes.volumes import has_helpers
from airflow_mlpipelines.compute.kubernetes.watch import (
    Observer,
    PodEnd,
    StartTimeoutError,
    StartWatch,
    StillWaitingError,
    container_state,
    is_leaving,
    watch_step,
)
from airflow_mlpipelines.compute.stopped import was_killed
from airflow_mlpipelines.compute.time_limits import enforce_timeout

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from airflow_mlpipelines.compute.base import Emit, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.compute.kubernetes.relaunch import PodNote
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

log = logging.getLogger(__name__)

TAIL_LINES = 50
"""How much of its log a failed step's error shows."""
_PAUSE = 0.2
_LATE = (Reason.UNSCHEDULED, Reason.UNSTARTED)
"""What a trigger finds by the time that a pod has waited, of which its next worker knows nothing."""


@dataclass
class Stops:
    """Why this worker has told the pod to end, if it has.

    Attributes:
        killed: Somebody stopped the step.
        expired: Its time was up.
        look: Returns the pod, or the Job, as this worker has seen it last: whoever stops it has no time to ask.
    """

    killed: bool = False
    expired: bool = False
    look: Callable[[], Mapping[str, Any]] | None = None

    def __bool__(self) -> bool:
        return self.killed or self.expired


def choose_stay(
    launch: StepLaunch, compute: KubernetesComputeSpec, news: PodNews | None, name: str
) -> float:
    """Return until when, by :func:`time.monotonic`, this worker stays with the pods of a step run."""
    if not (launch.detach and compute.deferrable):
        return math.inf
    if news is not None and news.reason is Reason.UNSEEN:
        log.warning(
            "The triggerer could not watch pod %s (%s), so this worker stays with it. Give the triggerer the "
            "workers' way to the cluster, and the rights to list and watch pods.",
            name,
            news.message,
        )
        return math.inf
    return time.monotonic() + compute.defer_after_seconds


class PodFollower:
    """Stays beside one step's pod, for as long as this worker is to. One instance serves one try.

    Attributes:
        stays_until: How long that is: a time of :func:`time.monotonic`.
    """

    def __init__(
        self,
        cluster: Cluster,
        launch: StepLaunch,
        spec: PodSpec,
        *,
        note: PodNote,
        news: PodNews | None,
        stops: Stops,
    ) -> None:
        """Prepare; nothing is asked of the cluster yet.

        Args:
            cluster: The connection of the thread that calls the methods.
            launch: The step run.
            spec: Its pod.
            note: What is noted of the pod.
            news: What a trigger has found out; None in a try's first worker.
            stops: Says why the pod was told to end, if it was.
        """
        self._cluster = cluster
        self._launch = launch
        self._spec = spec
        self._note = note
        self._news = news
        self._stops = stops
        self._compute: KubernetesComputeSpec = cluster.compute
        self.stays_until = choose_stay(launch, cluster.compute, news, spec.name)

    def detach(
        self,
        pod: Mapping[str, Any],
        awaits: Awaited,
        logs: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> DetachedError:
        """Return what to raise to leave the pod to itself; ``logs`` says how far they were handed on."""
        meta, spec, compute = pod["metadata"], self._spec, self._compute
        self._note.set(meta["uid"], awaits=awaits.value)
        states = (container_state(pod, STAGE)[0], container_state(pod, STEP)[0])
        waits = states[0] != "running" and states[1] == "waiting"
        what = "waits for its node and images" if waits else "goes on"
        log.info("Pod %s %s without a worker; its log follows here", spec.name, what)
        watch = PodWatch(
            compute=compute.name,
            namespace=compute.namespace,
            conn_id=compute.conn_id,
            in_cluster=compute.in_cluster,
            selector=f"{STEP_RUN_LABEL}={label_value(spec.step_run_id)}",
            pods={spec.name: meta["uid"]},
            secret=spec.name if has_secret(pod) else None,
            awaits=awaits,
            schedule_seconds=compute.schedule_timeout_seconds,
            startup_seconds=compute.startup_timeout_seconds,
            timeout_seconds=self._launch.timeout_seconds,
            logs={spec.name: self._log_position(), **(logs or {})},
        )
        return DetachedError(watch.to_dict())

    @property
    def staging_log(self) -> str:
        """What the agent's log is called beside the step's."""
        return f"{self._spec.name}/{STAGE}"

    def _log_position(self) -> Mapping[str, Any] | None:
        """Return how far the pod's log was handed on before this worker came."""
        return self._news.logs.get(self._spec.name) if self._news is not None else None

    def await_pod(self, done: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """Return the pod once ``done``.

        Raises:
            StillWaitingError: This worker has stayed with it for long enough.
            StepFailedError: It will never be, or was killed.
            ComputeUnavailableError: It took too long.
        """
        reason = self._news.reason if self._news is not None else None
        step, spec, compute = self._launch.step_name, self._spec, self._compute
        errors = StartErrors()
        watch = StartWatch(
            self._cluster,
            spec.name,
            schedule_seconds=compute.schedule_timeout_seconds,
            startup_seconds=compute.startup_timeout_seconds,
            is_hopeless=lambda pod, waited: (
                self._stops.killed
                or reason in _LATE
                or errors.is_hopeless(pod, math.inf if reason is Reason.HOPELESS else waited)
            ),
            patience=self.stays_until,
        )
        try:
            pod = watch.until(done)
            if pod is not None and not done(pod) and reason in _LATE:
                raise StartTimeoutError(pod, scheduled=reason is Reason.UNSTARTED)
        except StartTimeoutError as timeout:
            raise timeout_failure(step, timeout, spec, compute, self._cluster) from timeout
        if self._stops.killed:
            raise was_killed(self._launch)
        if pod is None or not done(pod):
            raise start_failure(step, pod, spec, compute)
        return pod

    def follow_staging(self, emit: Emit) -> None:
        """Hand on what the agent says until it has ended, however long that takes: as there are data."""
        log_name, position = self.staging_log, None
        if self._news is not None:
            if log_name not in self._news.logs:  # an earlier worker has handed on all of it
                return
            position = self._news.logs[log_name]
        try:
            self.await_pod(lambda found: container_state(found, STAGE)[0] != "waiting")
        except StillWaitingError as error:
            raise self.detach(error.pod, Awaited.END, logs={log_name: position}) from None
        follower = LogFollower(self._cluster, self._spec.name, emit, position, container=STAGE)
        while True:
            pod, _ = self._cluster.find_patiently(
                "pods", self._spec.name, patience=PATIENCE_SECONDS
            )
            if pod is None or is_leaving(pod):
                break
            ended = container_state(pod, STAGE)[0] == "terminated"
            with suppress(ClusterError):
                follower.read(follow=True, until=math.inf if ended else self.stays_until)
            if ended:
                break
            if time.monotonic() > self.stays_until:
                raise self.detach(pod, Awaited.END, logs={log_name: follower.to_dict()})
            time.sleep(_PAUSE)
        follower.finish()

    def await_step(self) -> Mapping[str, Any]:
        """Return the pod once its step has begun."""
        try:
            return self.await_pod(lambda found: container_state(found, STEP)[0] != "waiting")
        except StillWaitingError as error:
            raise self.detach(error.pod, Awaited.END) from None

    def follow(self, pod: Mapping[str, Any], emit: Emit) -> PodEnd:
        """Hand on the step's log until it ends; return how."""
        cluster, spec = self._cluster, self._spec
        follower = LogFollower(cluster, spec.name, emit, self._log_position())
        relay: AbstractContextManager[object] = nullcontext()
        if has_helpers(pod):
            relay = RunFileRelay(cluster, spec.name, self._launch.stage)
        with relay, Observer(cluster, pod) as observer:
            self._stops.look = observer.look
            try:
                return watch_step(
                    cluster,
                    pod,
                    follower,
                    observer=observer,
                    is_stopped=lambda: bool(self._stops),
                    until=self.stays_until,
                )
            except StillWaitingError as error:
                position = {spec.name: follower.to_dict()}
                raise self.detach(error.pod, Awaited.END, logs=position) from None

    def enforce_timeout(self, pod: Mapping[str, Any], over: threading.Event) -> None:
        """Have the pod ended when the step's time is up, unless it is over before."""
        meta = pod["metadata"]

        def end() -> None:
            self._stops.expired = True
            cluster = self._cluster.again()
            cluster.delete("pods", meta["name"], seconds=KILL_SECONDS, uid=meta["uid"])

        enforce_timeout(
            self._launch.timeout_seconds,
            over,
            find_start=lambda: container_state(pod, STEP)[1].get("startedAt"),
            end=end,
        )
