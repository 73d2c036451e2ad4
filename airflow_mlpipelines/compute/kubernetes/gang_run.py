"""The life of a gang of pods under one try: made or adopted, given its files, followed to its end, removed."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import DetachedError
from airflow_mlpipelines.compute.gang_logs import GangLogs
from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    ClusterError,
    ClusterLostError,
)
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodNews
from airflow_mlpipelines.compute.kubernetes.failures import end_failure, lost_unseen
from airflow_mlpipelines.compute.kubernetes.following import TAIL_LINES, choose_stay
from airflow_mlpipelines.compute.kubernetes.gang import (
    await_gang_removal,
    create_belongings,
    create_gang,
    discard_gang,
    find_gang,
    force_gang,
    remove_gang,
    watch_gang,
)
from airflow_mlpipelines.compute.kubernetes.gang_files import fetch_nodes
from airflow_mlpipelines.compute.kubernetes.gang_start import (
    GangStillWaitingError,
    at_node,
    await_pods,
)
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    belongs_to,
    has_files,
    take_over,
)
from airflow_mlpipelines.compute.kubernetes.logs import LogFollower, read_tail
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.relay import RunFileRelay
from airflow_mlpipelines.compute.kubernetes.removal import patience_after
from airflow_mlpipelines.compute.kubernetes.room import make_when_room
from airflow_mlpipelines.compute.kubernetes.transfer import deliver
from airflow_mlpipelines.compute.kubernetes.volumes import hand_over, look_again
from airflow_mlpipelines.compute.kubernetes.watch import (
    Observer,
    PodEnd,
    StillWaitingError,
    container_state,
    is_over,
    watch_step,
)
from airflow_mlpipelines.compute.stopped import ran_too_long, was_killed
from airflow_mlpipelines.compute.threads import in_parallel
from airflow_mlpipelines.compute.time_limits import enforce_timeout
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from airflow_mlpipelines.runtime.nodes import FOLLOWED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from airflow_mlpipelines.compute.base import Emit, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.following import Stops
    from airflow_mlpipelines.compute.kubernetes.gang import GangSpec, Pods
    from airflow_mlpipelines.compute.kubernetes.relaunch import PodNote

log = logging.getLogger(__name__)

_FOLLOW_SECONDS = 15.0
"""What the other nodes have to end by themselves after the first that failed."""
_FORCE_SECONDS = 60.0
_GONE_SECONDS = 20.0
_INTERRUPTED_SECONDS = 4.0


class GangAttendant:
    """Sees one step run through on the pods of a gang. One instance serves one try."""

    def __init__(
        self,
        cluster: Cluster,
        launch: StepLaunch,
        spec: GangSpec,
        *,
        token: str,
        note: PodNote,
        stops: Stops,
    ) -> None:
        """Prepare, with what :class:`~airflow_mlpipelines.compute.kubernetes.attending.PodAttendant` takes."""
        self._cluster = cluster
        self._launch = launch
        self._spec = spec
        self._token = token
        self._note = note
        self._stops = stops
        self._news = PodNews.from_dict(launch.news) if launch.news is not None else None
        self._left: set[str] = set()
        self._positions: dict[str, Mapping[str, Any] | None] = {}

    def run(self, emit: Emit) -> None:
        """Run all nodes to their end, or adopt those of an earlier try; what they made is on the worker then.

        Raises:
            DetachedError: They take long, and go on without this worker.
            StepFailedError: They did not start, were killed, or one ended with another exit code than 0.
            ComputeUnavailableError: They did not all get a place in time.
            ClusterError: The cluster refuses.
            ClusterLostError: It does not answer. What runs is left alone, for the next try to adopt.
        """
        self._stays_until = choose_stay(
            self._launch, self._cluster.compute, self._news, self._spec.name
        )
        pods = self._find()
        if pods is None:
            if self._stops.killed:
                raise was_killed(self._launch)
            hand_over(self._spec.pod)
            made = make_when_room(
                lambda: create_gang(self._cluster, self._spec, self._token),
                self._launch,
                self._cluster.compute,
                note=self._note,
                until=self._stays_until,
                is_stopped=lambda: self._stops.killed,
            )
            if made is None:
                raise was_killed(self._launch)
            job, self._stops.look = made, lambda: made
            self._prepare(job)
        else:
            job = take_over(self._cluster, "jobs", self._spec.name, self._token)
            self._stops.look = lambda: job
            for pod in pods:  # from a trigger, which notes at them that they are its own
                take_over(self._cluster, "pods", str(pod["metadata"]["name"]), self._token)
            if self._news is None:
                log.info("Adopting Job %s of an earlier try, with its log so far:", self._spec.name)
            else:
                log.info("Going on with Job %s: %s", self._spec.name, self._news.reason)
            if not all(has_files(pod) for pod in pods):
                hand_over(
                    self._spec.pod
                )  # what they are to write to has been made anew for this try
                self._prepare(None)
        self._check(self._attend(emit))

    def _find(self) -> Pods | None:
        """Return the pods to go on with; None if there are to be new ones."""
        note, step_run_id = self._note, self._launch.step_run_id
        waits = note.awaits is not None
        found = find_gang(self._cluster, step_run_id, note.job, waits=waits)
        if found is None and self._news is not None:
            seen = [self._news.pods[name] for name in sorted(self._news.pods)]
            gone = [pod for pod in seen if is_over(pod)]
            note.set(None)
            raise lost_unseen(self._launch.step_name, next(iter(gone or seen), None))
        return found

    def _prepare(self, job: Mapping[str, Any] | None) -> None:
        """Give all pods their files; whatever fails on the way leaves none. ``job`` is one made now."""
        cluster, spec = self._cluster, self._spec
        try:
            # Noted before anything of the program can run: whatever runs can be found again.
            if job is not None:
                self._note.set(None, job=job["metadata"]["uid"])
                log.info("Job %s in namespace %s", spec.name, cluster.namespace)
                create_belongings(cluster, spec, job)
            pods = self._await(
                lambda pod: has_files(pod) or container_state(pod, STAGE)[0] == "running",
                Awaited.FILES,
            )
            self._note.set(None, job=self._note.job)
            in_parallel(self._deliver, [pod for pod in pods if not has_files(pod)])
        except DetachedError:
            raise
        except BaseException as error:
            with suppress(ClusterError):
                patience = patience_after(error)
                discard_gang(cluster.again(), self._launch.step_run_id, patience=patience)
            self._note.set(None)
            raise

    def _detach(
        self,
        pods: Iterable[Mapping[str, Any]],
        awaits: Awaited,
        logs: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> DetachedError:
        """Return what to raise to leave the pods to themselves; ``logs`` says how far they were handed on."""
        spec, compute = self._spec, self._cluster.compute
        self._note.set(None, job=self._note.job, awaits=awaits.value)
        what = "wait for their nodes and images" if awaits is Awaited.FILES else "go on"
        log.info("The pods of Job %s %s without a worker; their log follows here", spec.name, what)
        watch = watch_gang(spec, compute, pods, awaits)
        known = {name: self._log_position(name) for name in watch.pods}
        watch = replace(
            watch, timeout_seconds=self._launch.timeout_seconds, logs={**known, **(logs or {})}
        )
        return DetachedError(watch.to_dict())

    def _log_position(self, pod: str) -> Mapping[str, Any] | None:
        """Return how far the pod's log was handed on before this worker came."""
        return self._news.logs.get(pod) if self._news is not None else None

    def _deliver(self, pod: Mapping[str, Any]) -> None:
        named = replace(self._spec.pod, name=pod["metadata"]["name"])
        deliver(self._cluster.again(), named, self._launch.stage)

    def _await(self, done: Callable[[Mapping[str, Any]], bool], awaits: Awaited) -> Pods:
        """Return all pods once they are ``done``.

        Raises:
            DetachedError: This worker has stayed with them for long enough.
        """
        try:
            pods = await_pods(
                self._cluster,
                self._launch.step_name,
                self._spec,
                done,
                is_stopped=lambda: self._stops.killed,
                until=self._stays_until,
                found=self._news.reason if self._news is not None else None,
            )
        except GangStillWaitingError as error:
            raise self._detach(error.pods, awaits) from None
        if self._stops.killed:
            raise was_killed(self._launch)
        return pods

    def _attend(self, emit: Emit) -> GangLogs[PodEnd]:
        """Return the logs with all nodes' ends; what the nodes made is on the worker.

        The pods are kept or removed, as a single one is.
        """
        cluster, step_run_id = self._cluster, self._launch.step_run_id
        over = threading.Event()
        logs: GangLogs[PodEnd] | None = None
        try:
            pods = self._await(lambda pod: container_state(pod, STEP)[0] != "waiting", Awaited.END)
            enforce_timeout(
                self._launch.timeout_seconds,
                over,
                find_start=lambda: container_state(pods[0], STEP)[1].get("startedAt"),
                end=self._end_late,
            )
            logs = GangLogs([partial(self._watch, pod) for pod in pods], emit)
            first = str(pods[0]["metadata"]["name"])
            with RunFileRelay(cluster, first, self._launch.stage):
                self._await_all(logs)
            if self._left and not self._stops:
                ends = (end.pod for end in logs.ends.values())
                raise self._detach(ends, Awaited.END, self._positions)
            over.set()  # what they have made takes its own time to be fetched
            job, _ = cluster.find_patiently("jobs", self._spec.name, patience=PATIENCE_SECONDS)
            if job is not None and not belongs_to(job, self._token):
                raise StepFailedError(
                    self._launch.step_name,
                    "a later try has adopted its pods, and goes on with them",
                )
            self._fetch(logs)
        except (ClusterLostError, ClusterError, DetachedError):
            raise  # the pods are left alone, for the next try to adopt
        except BaseException as error:
            # Above all a timeout or an interrupt, which Airflow raises in here.
            with suppress(ClusterError):
                own = cluster.again()
                job = own.find("jobs", self._spec.name)
                if job is not None and belongs_to(job, self._token):
                    discard_gang(own, step_run_id, patience=patience_after(error))
                    if not isinstance(error, StepFailedError | ComputeUnavailableError):
                        await_gang_removal(own, step_run_id, seconds=_INTERRUPTED_SECONDS)
                if job is None or belongs_to(job, self._token):
                    self._note.set(None)
            raise
        finally:
            over.set()
            if logs is not None:
                logs.close()
        self._settle(logs)
        return logs

    def _has_succeeded(self, logs: GangLogs[PodEnd]) -> bool:
        return not self._stops and all(_code(end) == 0 for end in logs.ends.values())

    def _fetch(self, logs: GangLogs[PodEnd]) -> None:
        """Bring to the worker what all nodes have made, and the end of the log of the one to blame."""
        cluster = self._cluster
        succeeded = self._has_succeeded(logs)
        names = [str(end.pod["metadata"]["name"]) for _, end in sorted(logs.ends.items())]
        culprit = find_culprit(logs.ends)
        if self._news is not None and culprit is not None:
            # A trigger has handed on the lines before.
            logs.tails[culprit].clear()
            logs.tails[culprit].extend(read_tail(cluster, names[culprit], lines=TAIL_LINES))
        fetch_nodes(cluster, self._launch, self._spec.pod, names, with_outputs=succeeded)

    def _settle(self, logs: GangLogs[PodEnd]) -> None:
        """Remove pods whose ends are known, unless what they have made may be needed once more."""
        cluster, step_run_id = self._cluster, self._launch.step_run_id
        if self._has_succeeded(logs) and not self._spec.pod.written:
            return
        try:
            discard_gang(cluster, step_run_id, seconds=1)
        except ClusterError as error:  # what is left is removed by the next try, or by release()
            log.warning("Job %s can't be removed: %s", self._spec.name, error)
        if self._spec.pod.written:  # only what can't change any more is digested
            remove_gang(cluster, step_run_id)
            look_again(self._launch.stage.outputs_root)
        elif self._stops and not await_gang_removal(cluster, step_run_id, seconds=_GONE_SECONDS):
            log.warning("Pods of Job %s are still ending", self._spec.name)
        self._note.set(None)

    def _watch(self, pod: Mapping[str, Any], emit: Emit) -> PodEnd:
        """Return how a node has ended, or, without an end, how it is when this worker has stayed long enough."""
        cluster, name = self._cluster.again(), str(pod["metadata"]["name"])
        follower = LogFollower(cluster, name, emit, self._log_position(name))
        try:
            with Observer(cluster, pod) as observer:
                return watch_step(
                    cluster,
                    pod,
                    follower,
                    observer=observer,
                    is_stopped=lambda: bool(self._stops),
                    until=self._stays_until,
                )
        except StillWaitingError as error:
            self._left.add(name)
            return PodEnd(error.pod, None)
        finally:
            self._positions[name] = follower.to_dict()

    def _await_all(self, logs: GangLogs[PodEnd]) -> None:
        """Hand on the logs until all nodes have ended; where one has failed, none outlives it for long.

        Raises:
            ComputeUnavailableError: One does not answer, and may still write to a shared volume.
        """
        deadline: float | None = None
        end_gang: Callable[[Cluster, str], None] = discard_gang
        while len(logs.ends) < self._spec.nodes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended = logs.follow(left)
            if ended is None:
                with suppress(ClusterError):
                    end_gang(self._cluster.again(), self._launch.step_run_id)
                end_gang = force_gang  # next time, of a node that does not answer
                deadline = time.monotonic() + _FORCE_SECONDS
            elif deadline is None and _code(ended[1]) != 0 and not self._left:
                deadline = time.monotonic() + _FOLLOW_SECONDS

    def _end_late(self) -> None:
        self._stops.expired = True
        discard_gang(self._cluster.again(), self._launch.step_run_id)

    def _check(self, logs: GangLogs[PodEnd]) -> None:
        """Return if all nodes ended well.

        Raises:
            StepFailedError: One did not: the one that the others followed.
        """
        step = self._launch.step_name
        if self._stops.killed:
            raise was_killed(self._launch, tuple(logs.tails[0]))
        if self._stops.expired:
            raise ran_too_long(self._launch, _code(logs.ends[0]), tuple(logs.tails[0]))
        node = find_culprit(logs.ends)
        if node is not None:
            logs.retell(node)
            end = logs.ends[node]
            error = end_failure(step, end, self._spec.pod, tuple(logs.tails[node]))
            raise at_node(error, end.pod, self._spec)


def find_culprit(ends: Mapping[int, PodEnd]) -> int | None:
    """Return the node that failed first, as far as ends tell; None if all ended well.

    A node that lacked memory, or whose pod was taken away, is to blame for others; one that was ended because
    of another node is not, if there is any such.
    """
    failed = sorted(node for node, end in ends.items() if _code(end) != 0)
    for is_cause in (
        lambda end: end.step is not None and end.step.get("reason") == "OOMKilled",
        lambda end: _code(end) not in (None, FOLLOWED) and not end.gone,
        lambda end: end.step is None,
        lambda end: _code(end) != FOLLOWED,
        lambda _end: True,
    ):
        for node in failed:
            if is_cause(ends[node]):
                return node
    return None


def _code(end: PodEnd) -> int | None:
    return end.step.get("exitCode") if end.step is not None else None
