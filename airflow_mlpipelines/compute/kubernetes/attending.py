"""The life of one step run's pod: made or adopted, given its files, seen through to its end, emptied and removed."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import DetachedError
from airflow_mlpipelines.compute.kubernetes.channel import CommandError
from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    ClusterError,
    ClusterLostError,
    PodUnreachableError,
)
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodNews
from airflow_mlpipelines.compute.kubernetes.failures import (
    end_failure,
    lost_unseen,
)
from airflow_mlpipelines.compute.kubernetes.following import (
    TAIL_LINES,
    PodFollower,
    Stops,
)
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    KILL_SECONDS,
    belongs_to,
    create_pod,
    create_secret,
    discard,
    remove_pod,
    take_over,
)
from airflow_mlpipelines.compute.kubernetes.logs import read_tail
from airflow_mlpipelines.compute.kubernetes.packing import awaits_files, pack_files
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.refusals import find_shortage
from airflow_mlpipelines.compute.kubernetes.removal import patience_after
from airflow_mlpipelines.compute.kubernetes.room import make_when_room
from airflow_mlpipelines.compute.kubernetes.transfer import collect, deliver
from airflow_mlpipelines.compute.kubernetes.volumes import (
    hand_over,
    has_helpers,
    look_again,
    writes_in_place,
)
from airflow_mlpipelines.compute.kubernetes.watch import (
    PodEnd,
    StillWaitingError,
    await_removal,
    container_state,
)
from airflow_mlpipelines.compute.stopped import ran_too_long, was_killed
from airflow_mlpipelines.exceptions import (
    ComputeUnavailableError,
    DataError,
    StepFailedError,
    StoreError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.compute.base import Emit, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.compute.kubernetes.relaunch import PodNote

log = logging.getLogger(__name__)

_GONE_SECONDS = 15.0
_INTERRUPTED_SECONDS = 4.0


class _AdoptedByAnotherError(Exception):
    """Another try owns the pod by now."""


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

    def run(self, pod: Mapping[str, Any] | None, emit: Emit) -> PodEnd:
        """Return how the step ended; what it made is on the worker then.

        The pod of a step that has ended well is kept, with the note of it, until :meth:`~airflow_mlpipelines.compute.base.Launcher.release`, unless it has
        written to a shared volume: only what can't change any more is digested. Any other pod is removed.

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
        if pod is not None:
            self._spec = replace(self._spec, image_name=_image_name(pod) or self._spec.image_name)
        else:
            self._spec = pack_files(self._spec, self._launch.stage)
        self._follower = PodFollower(
            self._cluster,
            self._launch,
            self._spec,
            note=self._note,
            news=self._news,
            stops=self._stops,
        )
        if pod is None:
            if self._stops.killed:
                raise was_killed(self._launch)
            hand_over(self._spec)
            made = make_when_room(
                self._make,
                self._launch,
                self._cluster.compute,
                note=self._note,
                until=self._follower.stays_until,
                is_stopped=lambda: self._stops.killed,
            )
            if made is None:
                raise was_killed(self._launch)
            pod, self._stops.look = made, lambda: made
            if awaits_files(pod):
                self._prepare(pod)
        else:
            own = take_over(self._cluster, "pods", self._spec.name, self._token)
            self._stops.look = lambda: own
            if self._news is None:
                log.info("Adopting pod %s of an earlier try, with its log so far:", self._spec.name)
            else:
                log.info("Going on with pod %s: %s", self._spec.name, self._news.reason)
            if awaits_files(pod):
                hand_over(self._spec)  # what it is to write to has been made anew for this try
                self._prepare(pod)
        return self._attend(pod, emit)

    def check(self, end: PodEnd, log_tail: tuple[str, ...]) -> None:
        """Return if the step ended well.

        Raises:
            StepFailedError: It did not.
        """
        code = end.step.get("exitCode") if end.step is not None else None
        log_tail = self._tail or log_tail
        if self._stops.killed:
            raise was_killed(self._launch, log_tail)
        if self._stops.expired:
            raise ran_too_long(self._launch, code, log_tail)
        if code != 0:
            raise end_failure(self._launch.step_name, end, self._spec, log_tail)

    def _make(self) -> Mapping[str, Any]:
        """Return the pod, made now with its Secret; where the cluster refuses either, none of them is left."""
        cluster, spec, queued_at = self._cluster, self._spec, self._note.queued_at
        pod = create_pod(cluster, spec, self._token)
        try:
            # Noted before anything of the program can run: whatever runs can be found again.
            self._note.set(pod["metadata"]["uid"])
            if spec.needs_secret:
                create_secret(cluster, spec, pod)
        except BaseException as error:
            self._give_up(pod, error)
            if isinstance(error, ClusterError) and find_shortage(error) is not None:
                remove_pod(cluster, pod)  # the next one has its name
                if queued_at is not None:
                    self._note.queue(queued_at)
            raise
        log.info("Pod %s in namespace %s", spec.name, cluster.namespace)
        return pod

    def _prepare(self, pod: Mapping[str, Any]) -> None:
        """Let the pod's step begin; whatever fails on the way leaves no pod."""
        try:
            self._deliver(pod["metadata"]["uid"])
        except DetachedError:
            raise
        except BaseException as error:
            self._give_up(pod, error)
            raise

    def _give_up(self, pod: Mapping[str, Any], error: BaseException) -> None:
        with suppress(ClusterError):
            patience = patience_after(error)
            discard(self._cluster, self._spec, pod, seconds=KILL_SECONDS, patience=patience)
        self._note.set(None)

    def _deliver(self, uid: str) -> None:
        """Send the step's files once the pod can take them.

        Raises:
            DetachedError: It waits in a queue, and goes on doing so without this worker.
        """
        try:
            self._follower.await_pod(lambda found: container_state(found, STAGE)[0] == "running")
        except StillWaitingError as error:
            unread = {self._follower.staging_log: None} if self._launch.carriage else {}
            raise self._follower.detach(error.pod, Awaited.FILES, logs=unread) from None
        self._note.set(uid)
        deliver(self._cluster, self._spec, self._launch.stage)

    def _attend(self, pod: Mapping[str, Any], emit: Emit) -> PodEnd:
        cluster, spec = self._cluster, self._spec
        over = threading.Event()
        try:
            if self._launch.carriage:
                self._follower.follow_staging(emit)
            pod = self._follower.await_step()
            self._follower.enforce_timeout(pod, over)
            end = self._follower.follow(pod, emit)
            over.set()  # what it has made takes its own time to be fetched
            if not belongs_to(end.pod, self._token):
                raise _AdoptedByAnotherError
            self._fetch(end, emit)
        except _AdoptedByAnotherError as error:
            raise StepFailedError(
                self._launch.step_name, "a later try has adopted its pod, and goes on with it"
            ) from error
        except (ClusterLostError, ClusterError, StoreError, DetachedError):
            raise  # the pod is left alone, for the next try to adopt
        except BaseException as error:
            # Above all a timeout or an interrupt, which Airflow raises in here.
            with suppress(ClusterError):
                own = cluster.again()
                found = own.find("pods", spec.name)
                if found is not None and belongs_to(found, self._token):
                    patience = patience_after(error)
                    discard(own, spec, pod, seconds=KILL_SECONDS, patience=patience)
                if not isinstance(error, StepFailedError | ComputeUnavailableError):
                    self._await_removal(own, pod, _INTERRUPTED_SECONDS)
            self._note.set(None)
            raise
        finally:
            over.set()
        if not self._has_succeeded(end) or spec.written:
            self._remove(pod)
            self._note.set(None)
        return end

    def _remove(self, pod: Mapping[str, Any]) -> None:
        """Remove a pod whose end is known, and of which nothing is needed any more.

        Raises:
            ComputeUnavailableError: It does not go, and could still write to a volume.
        """
        try:
            discard(self._cluster, self._spec, pod, seconds=1)
        except ClusterError as error:  # what is left is removed by the next try, or by release()
            log.warning("Pod %s can't be removed: %s", self._spec.name, error)
        if self._stops:
            self._await_removal(self._cluster, pod, _GONE_SECONDS)
        elif writes_in_place(pod):
            # Only what can't change any more is digested.
            remove_pod(self._cluster, pod)
            look_again(self._launch.stage.outputs_root)

    def _has_succeeded(self, end: PodEnd) -> bool:
        return end.step is not None and end.step.get("exitCode") == 0 and not self._stops

    def _fetch(self, end: PodEnd, emit: Emit) -> None:
        """Have what the step has made committed, or bring it to the worker."""
        succeeded = self._has_succeeded(end)
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
        except DataError as error:
            if succeeded:
                raise
            log.warning("Its ./outputs and ./logs can't be kept: %s", error)

    def _await_removal(self, cluster: Cluster, pod: Mapping[str, Any], seconds: float) -> None:
        meta = pod["metadata"]
        if not await_removal(cluster, meta["name"], meta["uid"], seconds=seconds):
            log.warning("Pod %s is still ending", meta["name"])


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
