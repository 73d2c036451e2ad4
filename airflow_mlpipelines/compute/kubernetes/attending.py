"""The life of one step run's pod: made or adopted, given its files, followed to its end, emptied and removed."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import DetachedError
from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.compute.kubernetes.channel import CommandError
from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    ClusterError,
    ClusterLostError,
    PodUnreachableError,
)
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodNews, PodWatch, Reason
from airflow_mlpipelines.compute.kubernetes.failures import (
    end_failure,
    is_hopeless,
    lost_unseen,
    start_failure,
    timeout_failure,
)
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    KILL_SECONDS,
    belongs_to,
    create_pod,
    create_secret,
    discard,
    has_files,
    remove_pod,
    take_over,
)
from airflow_mlpipelines.compute.kubernetes.logs import LogFollower, read_tail
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, STEP, label_value
from airflow_mlpipelines.compute.kubernetes.relay import RunFileRelay
from airflow_mlpipelines.compute.kubernetes.transfer import collect, deliver
from airflow_mlpipelines.compute.kubernetes.volumes import (
    hand_over,
    has_helpers,
    look_again,
    writes_in_place,
)
from airflow_mlpipelines.compute.kubernetes.watch import (
    Observer,
    PodEnd,
    StartTimeoutError,
    StartWatch,
    StillWaitingError,
    await_removal,
    container_state,
    is_leaving,
    watch_step,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
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
_GONE_SECONDS = 15.0
_INTERRUPTED_SECONDS = 4.0
_PAUSE = 0.2
_GIVEN_UP = (Reason.HOPELESS, Reason.UNSCHEDULED, Reason.UNSTARTED)
"""What a trigger finds by the time that a pod has waited, of which its next worker knows nothing."""


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


class PodAttendant:
    """Sees one step run through on one pod. One instance serves one try."""

    def __init__(
        self,
        cluster: Cluster,
        launch: StepLaunch,
        spec: PodSpec,
        *,
        token: str,
        note: PodNote,
        stops: Stops,
    ) -> None:
        """Prepare; nothing is asked of the cluster yet.

        Args:
            cluster: The connection of the thread that calls :meth:`run`.
            launch: The step run.
            spec: Its pod.
            token: A word that only this try knows.
            note: What is noted of the pod.
            stops: Changed by whoever stops the step.
        """
        self._cluster = cluster
        self._launch = launch
        self._spec = spec
        self._token = token
        self._note = note
        self._stops = stops
        self._news = PodNews.from_dict(launch.news) if launch.news is not None else None
        self._tail: tuple[str, ...] = ()

    @property
    def _compute(self) -> KubernetesComputeSpec:
        return self._cluster.compute

    def run(self, pod: Mapping[str, Any] | None, emit: Emit) -> PodEnd:
        """Return how the step ended; what it made is on the worker then, and the pod is removed.

        Args:
            pod: The pod of an earlier worker to go on with; None makes one.
            emit: Takes the lines of its log, from the first one on, or from where a trigger has stopped.

        Raises:
            DetachedError: It takes long, and goes on without this worker.
            StepFailedError: It did not start, was killed, or is no longer this try's.
            ComputeUnavailableError: It did not start in time.
            ClusterError: The cluster refuses.
            ClusterLostError: It does not answer. A pod that runs is left alone, for the next try to adopt.
        """
        self._stays_until = choose_stay(self._launch, self._compute, self._news, self._spec.name)
        if pod is None:
            if self._stops.killed:
                raise self._was_killed()
            hand_over(self._spec)
            pod = create_pod(self._cluster, self._spec, self._token)
            self._prepare(pod, is_new=True)
        else:
            take_over(self._cluster, "pods", self._spec.name, self._token)
            self._spec = replace(self._spec, image_name=_image_name(pod) or self._spec.image_name)
            if self._news is None:
                log.info("Adopting pod %s of an earlier try, with its log so far:", self._spec.name)
            else:
                log.info("Going on with pod %s: %s", self._spec.name, self._news.reason)
            if not has_files(pod):
                hand_over(self._spec)  # what it is to write to has been made anew for this try
                self._prepare(pod, is_new=False)
        return self._attend(pod, emit)

    def check(self, end: PodEnd, log_tail: tuple[str, ...]) -> None:
        """Return if the step ended well.

        Raises:
            StepFailedError: It did not.
        """
        code = end.step.get("exitCode") if end.step is not None else None
        log_tail = self._tail or log_tail
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

    def _prepare(self, pod: Mapping[str, Any], *, is_new: bool) -> None:
        """Let the pod's step begin; whatever fails on the way leaves no pod."""
        cluster, spec = self._cluster, self._spec
        uid = pod["metadata"]["uid"]
        try:
            # Noted before anything of the program can run: whatever runs can be found again.
            if is_new:
                self._note.set(uid)
                log.info("Pod %s in namespace %s", spec.name, cluster.namespace)
                if spec.needs_secret:
                    create_secret(cluster, spec, pod)
            if has_helpers(pod):
                self._deliver(uid)
        except DetachedError:
            raise
        except BaseException:
            with suppress(ClusterError):
                discard(cluster, spec, pod, seconds=KILL_SECONDS)
            self._note.set(None)
            raise

    def _deliver(self, uid: str) -> None:
        """Send the step's files once the pod can take them.

        Raises:
            DetachedError: It waits in a queue, and goes on doing so without this worker.
        """
        try:
            self._await(lambda found: container_state(found, STAGE)[0] == "running")
        except StillWaitingError as error:
            unread = {self._staging_log: None} if self._launch.carriage else {}
            raise self._detach(error.pod, Awaited.FILES, logs=unread) from None
        self._note.set(uid)
        deliver(self._cluster, self._spec, self._launch.stage)

    def _detach(
        self,
        pod: Mapping[str, Any],
        awaits: Awaited,
        logs: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> DetachedError:
        """Return what to raise to leave the pod to itself; ``logs`` says how far they were handed on."""
        meta, spec, compute = pod["metadata"], self._spec, self._compute
        self._note.set(meta["uid"], awaits=awaits.value)
        what = "waits for its node and images" if awaits is Awaited.FILES else "goes on"
        log.info("Pod %s %s without a worker; its log follows here", spec.name, what)
        watch = PodWatch(
            compute=compute.name,
            namespace=compute.namespace,
            conn_id=compute.conn_id,
            in_cluster=compute.in_cluster,
            selector=f"{STEP_RUN_LABEL}={label_value(spec.step_run_id)}",
            pods={spec.name: meta["uid"]},
            secret=spec.name if spec.needs_secret else None,
            awaits=awaits,
            schedule_seconds=compute.schedule_timeout_seconds,
            startup_seconds=compute.startup_timeout_seconds,
            timeout_seconds=self._launch.timeout_seconds,
            logs={spec.name: self._log_position(), **(logs or {})},
        )
        return DetachedError(watch.to_dict())

    @property
    def _staging_log(self) -> str:
        """What the agent's log is called beside the step's."""
        return f"{self._spec.name}/{STAGE}"

    def _log_position(self) -> Mapping[str, Any] | None:
        """Return how far the pod's log was handed on before this worker came."""
        return self._news.logs.get(self._spec.name) if self._news is not None else None

    def _await(self, done: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """Return the pod once ``done``.

        Raises:
            StillWaitingError: This worker has stayed with it for long enough.
            StepFailedError: It will never be, or was killed.
            ComputeUnavailableError: It took too long.
        """
        reason = self._news.reason if self._news is not None else None
        step, spec, compute = self._launch.step_name, self._spec, self._compute
        watch = StartWatch(
            self._cluster,
            spec.name,
            schedule_seconds=compute.schedule_timeout_seconds,
            startup_seconds=compute.startup_timeout_seconds,
            is_hopeless=lambda pod, waited: (
                self._stops.killed or reason in _GIVEN_UP or is_hopeless(pod, waited)
            ),
            patience=self._stays_until,
        )
        try:
            pod = watch.until(done)
            if (
                pod is not None
                and not done(pod)
                and reason in (Reason.UNSCHEDULED, Reason.UNSTARTED)
            ):
                raise StartTimeoutError(pod, scheduled=reason is Reason.UNSTARTED)
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
            if self._launch.carriage:
                self._follow_staging(emit)
            pod = self._await_step()
            if self._launch.timeout_seconds is not None:
                arguments = (pod, self._launch.timeout_seconds, over)
                threading.Thread(target=self._enforce_timeout, args=arguments, daemon=True).start()
            end = self._follow(pod, emit)
            over.set()  # what it has made takes its own time to be fetched
            if not belongs_to(end.pod, self._token):
                raise _AdoptedByAnotherError
            self._fetch(end, emit)
        except _AdoptedByAnotherError as error:
            raise StepFailedError(
                self._launch.step_name, "a later try has adopted its pod, and goes on with it"
            ) from error
        except (ClusterLostError, ClusterError, DetachedError):
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
            self._note.set(None)
            raise
        finally:
            over.set()
        self._remove(pod)
        self._note.set(None)
        return end

    def _remove(self, pod: Mapping[str, Any]) -> None:
        """Remove a pod whose end is known, and of which nothing is needed any more.

        Raises:
            ComputeUnavailableError: It does not go, and could still write to a volume.
        """
        with suppress(ClusterError):  # what is left, the next try removes
            discard(self._cluster, self._spec, pod, seconds=1)
        if self._stops:
            self._await_removal(self._cluster, pod, _GONE_SECONDS)
        elif writes_in_place(pod):
            # Only what can't change any more is digested.
            remove_pod(self._cluster, pod)
            look_again(self._launch.stage.outputs_root)

    def _follow_staging(self, emit: Emit) -> None:
        """Hand on what the agent says until it has ended, however long that takes: as there are data."""
        log_name, position = self._staging_log, None
        if self._news is not None:
            if log_name not in self._news.logs:  # an earlier worker has handed on all of it
                return
            position = self._news.logs[log_name]
        follower = LogFollower(self._cluster, self._spec.name, emit, position, container=STAGE)
        while True:
            pod, _ = self._cluster.find_patiently(
                "pods", self._spec.name, patience=PATIENCE_SECONDS
            )
            if pod is None or is_leaving(pod):
                break
            ended = container_state(pod, STAGE)[0] == "terminated"
            with suppress(ClusterError):
                follower.read(follow=True, until=math.inf if ended else self._stays_until)
            if ended:
                break
            if time.monotonic() > self._stays_until:
                raise self._detach(pod, Awaited.END, logs={log_name: follower.to_dict()})
            time.sleep(_PAUSE)
        follower.finish()

    def _await_step(self) -> Mapping[str, Any]:
        """Return the pod once its step has begun."""
        try:
            return self._await(lambda found: container_state(found, STEP)[0] != "waiting")
        except StillWaitingError as error:
            raise self._detach(error.pod, Awaited.END) from None

    def _follow(self, pod: Mapping[str, Any], emit: Emit) -> PodEnd:
        """Hand on the step's log until it ends; return how."""
        cluster, spec = self._cluster, self._spec
        follower = LogFollower(cluster, spec.name, emit, self._log_position())
        relay: AbstractContextManager[object] = nullcontext()
        if has_helpers(pod):
            relay = RunFileRelay(cluster, spec.name, self._launch.stage)
        with relay, Observer(cluster, pod) as observer:
            try:
                return watch_step(
                    cluster,
                    pod,
                    follower,
                    observer=observer,
                    is_stopped=lambda: bool(self._stops),
                    until=self._stays_until,
                )
            except StillWaitingError as error:
                position = {spec.name: follower.to_dict()}
                raise self._detach(error.pod, Awaited.END, logs=position) from None

    def _fetch(self, end: PodEnd, emit: Emit) -> None:
        """Have what the step has made committed, or bring it to the worker."""
        succeeded = end.step is not None and end.step.get("exitCode") == 0 and not self._stops
        spec = self._spec
        if self._news is not None and not succeeded:  # a trigger has handed on the lines before
            self._tail = read_tail(self._cluster, spec.name, lines=TAIL_LINES)
        image = _image_id(end.pod)
        if image is not None and "@" not in spec.image_name:
            log.info("Image %s was %s", spec.image_name, image)
        if not has_helpers(end.pod):
            return  # all of it is where the worker sees it
        try:
            collect(self._cluster, spec, self._launch, emit=emit, with_outputs=succeeded)
        except (ClusterError, PodUnreachableError) as error:
            found, _ = self._cluster.find_patiently("pods", spec.name, patience=PATIENCE_SECONDS)
            if succeeded and found is None:
                raise lost_unseen(self._launch.step_name, end.pod) from error
            if succeeded and isinstance(error, CommandError):
                raise StepFailedError(
                    self._launch.step_name,
                    f"it ended well, but its outputs can't be fetched from its pod: {error}",
                ) from error
            if succeeded:
                raise
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


def _image_name(pod: Mapping[str, Any]) -> str | None:
    for container in pod["spec"]["containers"]:
        if container["name"] == STEP:
            return str(container["image"])
    return None


def _image_id(pod: Mapping[str, Any]) -> str | None:
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == STEP and "sha256:" in str(container.get("imageID")):
            return str(container["imageID"])
    return None
