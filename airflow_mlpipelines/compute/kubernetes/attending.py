"""The life of one step run's pod: made or adopted, given its files, followed to its end, emptied and removed."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError, ClusterLostError
from airflow_mlpipelines.compute.kubernetes.failures import (
    end_failure,
    is_hopeless,
    start_failure,
    timeout_failure,
)
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    KILL_SECONDS,
    belongs_to,
    create_pod,
    create_secret,
    discard,
    take_over,
)
from airflow_mlpipelines.compute.kubernetes.logs import LogFollower
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.relay import RunFileRelay
from airflow_mlpipelines.compute.kubernetes.transfer import collect, deliver
from airflow_mlpipelines.compute.kubernetes.watch import (
    PodEnd,
    StartTimeoutError,
    StartWatch,
    await_removal,
    container_state,
    watch_step,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.base import Emit, HandleStore, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

log = logging.getLogger(__name__)

_GONE_SECONDS = 15.0
_INTERRUPTED_SECONDS = 4.0


class _AdoptedByAnotherError(Exception):
    """Another try owns the pod by now."""


@dataclass
class Stops:
    """Why this worker has told the pod to end, if it has.

    Attributes:
        killed: Somebody stopped the step.
        expired: Its time was up.
    """

    killed: bool = False
    expired: bool = False

    def __bool__(self) -> bool:
        return self.killed or self.expired


class PodAttendant:
    """Sees one step run through on one pod. One instance serves one try."""

    def __init__(
        self,
        cluster: Cluster,
        launch: StepLaunch,
        spec: PodSpec,
        *,
        token: str,
        handle: HandleStore,
        stops: Stops,
    ) -> None:
        """Prepare; nothing is asked of the cluster yet.

        Args:
            cluster: The connection of the thread that calls :meth:`run`.
            launch: The step run.
            spec: Its pod.
            token: A word that only this try knows.
            handle: Where the pod is noted.
            stops: Changed by whoever stops the step.
        """
        self._cluster = cluster
        self._launch = launch
        self._spec = spec
        self._token = token
        self._handle = handle
        self._stops = stops

    @property
    def _compute(self) -> KubernetesComputeSpec:
        return self._cluster.compute

    def run(self, pod: Mapping[str, Any] | None, emit: Emit) -> PodEnd:
        """Return how the step ended; what it made is on the worker then, and the pod is removed.

        Args:
            pod: The pod of an earlier try to go on with; None makes one.
            emit: Takes the lines of its log, from the first one on.

        Raises:
            StepFailedError: It did not start, was killed, or is no longer this try's.
            ComputeUnavailableError: It did not start in time.
            ClusterError: The cluster refuses.
            ClusterLostError: It does not answer. A pod that runs is left alone, for the next try to adopt.
        """
        if pod is None:
            pod = self._create()
        else:
            take_over(self._cluster, pod, self._token)
            log.info("Adopting pod %s of an earlier try, with its log so far:", self._spec.name)
        return self._attend(pod, emit)

    def check(self, end: PodEnd, log_tail: tuple[str, ...]) -> None:
        """Return if the step ended well.

        Raises:
            StepFailedError: It did not.
        """
        code = end.step.get("exitCode") if end.step is not None else None
        if self._stops.killed:
            raise self._was_killed(log_tail)
        if self._stops.expired:
            raise StepFailedError(
                self._launch.step_name,
                f"it ran longer than its timeout of {self._launch.timeout_seconds:g} seconds, and was killed",
                exit_code=code,
                log_tail=log_tail,
            )
        if code != 0:
            raise end_failure(self._launch.step_name, end, self._spec, log_tail)

    def _create(self) -> Mapping[str, Any]:
        """Return the pod, whose step may begin; whatever fails on the way leaves none."""
        cluster, spec = self._cluster, self._spec
        if self._stops.killed:
            raise self._was_killed()
        pod = create_pod(cluster, spec, self._token)
        try:
            # Noted before anything of the program can run: whatever runs can be found again.
            self._handle.set({"launcher": "kubernetes", "pod": pod["metadata"]["uid"]})
            log.info("Pod %s in namespace %s", spec.name, cluster.namespace)
            if spec.secrets:
                create_secret(cluster, spec, pod)
            self._await(lambda found: container_state(found, STAGE)[0] == "running")
            deliver(cluster, spec, self._launch.stage)
            return pod
        except BaseException:
            with suppress(ClusterError):
                discard(cluster, spec, pod, seconds=KILL_SECONDS)
            self._handle.set(None)
            raise

    def _await(self, done: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """Return the pod once ``done``.

        Raises:
            StepFailedError: It will never be, or was killed.
            ComputeUnavailableError: It took too long.
        """
        step, spec, compute = self._launch.step_name, self._spec, self._compute
        watch = StartWatch(
            self._cluster,
            spec.name,
            schedule_seconds=compute.schedule_timeout_seconds,
            startup_seconds=compute.startup_timeout_seconds,
            is_hopeless=lambda pod, waited: self._stops.killed or is_hopeless(pod, waited),
        )
        try:
            pod = watch.until(done)
        except StartTimeoutError as timeout:
            raise timeout_failure(step, timeout, spec, compute) from timeout
        if self._stops.killed:
            raise self._was_killed()
        if pod is None or not done(pod):
            raise start_failure(step, pod, spec, compute)
        return pod

    def _attend(self, pod: Mapping[str, Any], emit: Emit) -> PodEnd:
        cluster, spec = self._cluster, self._spec
        over = threading.Event()
        try:
            pod = self._await(lambda found: container_state(found, STEP)[0] != "waiting")
            if self._launch.timeout_seconds is not None:
                arguments = (pod, self._launch.timeout_seconds, over)
                threading.Thread(target=self._enforce_timeout, args=arguments, daemon=True).start()
            follower = LogFollower(cluster, spec.name, emit)
            with RunFileRelay(cluster, spec.name, self._launch.stage):
                end = watch_step(cluster, pod, follower, is_stopped=lambda: bool(self._stops))
            if not belongs_to(end.pod, self._token):
                raise _AdoptedByAnotherError
            self._fetch(end)
        except _AdoptedByAnotherError as error:
            raise StepFailedError(
                self._launch.step_name, "a later try has adopted its pod, and goes on with it"
            ) from error
        except (ClusterLostError, ClusterError):
            raise  # the pod is left alone, for the next try to adopt
        except BaseException as error:
            # Above all a timeout or an interrupt, which Airflow raises in here.
            with suppress(ClusterError):
                own = cluster.again()
                found = own.find("pods", spec.name)
                if found is not None and belongs_to(found, self._token):
                    discard(own, spec, pod, seconds=KILL_SECONDS)
                if not isinstance(error, StepFailedError | ComputeUnavailableError):
                    self._await_removal(own, pod, _INTERRUPTED_SECONDS)
            self._handle.set(None)
            raise
        finally:
            over.set()
        with suppress(ClusterError):  # what is left, the next try removes
            discard(cluster, spec, pod, seconds=1)
        if self._stops:
            self._await_removal(cluster, pod, _GONE_SECONDS)
        self._handle.set(None)
        return end

    def _fetch(self, end: PodEnd) -> None:
        """Bring to the worker what the step has made."""
        succeeded = end.step is not None and end.step.get("exitCode") == 0 and not self._stops
        spec = self._spec
        image = _image_id(end.pod)
        if image is not None and "@" not in spec.image_name:
            log.info("Image %s was %s", spec.image_name, image)
        try:
            collect(self._cluster, spec.name, self._launch.stage, with_outputs=succeeded)
        except ClusterError as error:
            if succeeded:
                raise StepFailedError(
                    self._launch.step_name,
                    f"it ended well, but its outputs can't be fetched from its pod: {error}",
                ) from error
            log.warning("The files of pod %s can't be fetched: %s", spec.name, error)

    def _await_removal(self, cluster: Cluster, pod: Mapping[str, Any], seconds: float) -> None:
        meta = pod["metadata"]
        if not await_removal(cluster, meta["name"], meta["uid"], seconds=seconds):
            log.warning("Pod %s is still ending", meta["name"])

    def _enforce_timeout(
        self, pod: Mapping[str, Any], seconds: float, over: threading.Event
    ) -> None:
        """End the pod when the step's time is up, counted from its start, also if another try began it."""
        left = seconds
        began = container_state(pod, STEP)[1].get("startedAt")
        if began is not None:
            left -= (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds()
        if over.wait(min(max(left, 0.0), seconds)):
            return
        self._stops.expired = True
        cluster = self._cluster.again()
        while not over.is_set():
            with suppress(ClusterError):
                meta = pod["metadata"]
                cluster.delete("pods", meta["name"], seconds=KILL_SECONDS, uid=meta["uid"])
                return
            over.wait(1.0)

    def _was_killed(self, log_tail: tuple[str, ...] = ()) -> StepFailedError:
        return StepFailedError(self._launch.step_name, "it was killed", log_tail=log_tail)


def _image_id(pod: Mapping[str, Any]) -> str | None:
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == STEP and "sha256:" in str(container.get("imageID")):
            return str(container["imageID"])
    return None
