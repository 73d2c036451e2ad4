"""Watching a pod: until its step begins, and from there to the step's end."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    ClusterError,
)
from airflow_mlpipelines.compute.kubernetes.pod import STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.logs import LogFollower

ENDED_PHASES = frozenset({"Succeeded", "Failed"})
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_PAUSE_AFTER_BREAK = 0.2
_READS_AFTER_END = 5
_EXPECTED_END_SECONDS = 15.0
_LONGEST_WATCH_SECONDS = 20.0
_WATCH_ANSWER_SECONDS = 5.0
_CHUNK = 64 << 10
_LAST_LOOK_SECONDS = 3.0
LOST_SECONDS = 30.0
"""How long after the end of its grace a pod that was told to go may still be there: later, its node is lost."""


class StillWaitingError(Exception):
    """The pod, whose state is ``pod``, has not got as far, and whoever waits has no more time for it."""

    def __init__(self, pod: Mapping[str, Any]) -> None:
        self.pod = pod
        super().__init__("still waiting")


class StartTimeoutError(Exception):
    """The pod, whose state is ``pod``, did not get as far in time."""

    def __init__(self, pod: Mapping[str, Any], *, scheduled: bool) -> None:
        self.pod = pod
        self.scheduled = scheduled
        super().__init__("not started in time")


@dataclass(frozen=True)
class PodEnd:
    """How a pod's step ended.

    Attributes:
        pod: The pod as it was seen last.
        step: Its state: ``{"exitCode": 1, "reason": "Error", …}``; None if it never ended by itself.
        gone: Whether the pod was deleted, or is about to be.
    """

    pod: Mapping[str, Any]
    step: Mapping[str, Any] | None
    gone: bool = False


def container_state(pod: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any]]:
    """Return ``waiting``, ``running`` or ``terminated``, and the facts of it."""
    status = pod.get("status", {})
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(kind) or ():
            if container["name"] == name:
                for state, facts in (container.get("state") or {}).items():
                    return state, facts or {}
    return "waiting", {}


def is_leaving(pod: Mapping[str, Any]) -> bool:
    """Return whether the pod was told to go."""
    return "deletionTimestamp" in pod["metadata"]


def is_over(pod: Mapping[str, Any]) -> bool:
    """Return whether nothing of the pod can begin any more, though its step perhaps never began."""
    return is_leaving(pod) or pod.get("status", {}).get("phase") in ENDED_PHASES


def is_lost(pod: Mapping[str, Any], now: datetime | None = None) -> bool:
    """Return whether the pod should have been gone for a while: its node does not answer any more."""
    told = pod["metadata"].get("deletionTimestamp")
    if told is None:
        return False
    late = ((now or datetime.now(UTC)) - datetime.fromisoformat(told)).total_seconds()
    return late > LOST_SECONDS


def find_condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return the pod's condition of this type, such as ``PodScheduled``; empty if it has none."""
    for condition in pod.get("status", {}).get("conditions") or ():
        if condition["type"] == kind:
            found: Mapping[str, Any] = condition
            return found
    return {}


@dataclass
class StartWatch:
    """Waits until a pod has got somewhere, as long as its compute allows."""

    cluster: Cluster
    pod: str
    schedule_seconds: float
    startup_seconds: float
    is_hopeless: Callable[[Mapping[str, Any], float], bool]
    """Whether a pod that waits for so many seconds will do so for ever."""
    patience: float = math.inf
    """A time of :func:`time.monotonic` after which it waits no longer."""

    def until(self, done: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any] | None:
        """Return the pod once ``done``, or once it is over or hopeless; None if it is gone.

        Raises:
            StillWaitingError: It is time for this worker to do something else.
            StartTimeoutError: It took too long.
            ClusterLostError: The API server was away for too long.
            ClusterError: It refuses.
        """
        self._began = time.monotonic()
        self._scheduled_at: float | None = None
        pause = _FIRST_PAUSE
        while True:
            pod, _ = self.cluster.find_patiently("pods", self.pod, patience=PATIENCE_SECONDS)
            if pod is None or self._is_enough(pod, done):
                return pod
            opened = time.monotonic()
            for changed in follow_changes(self.cluster, pod, seconds=self._seconds_left()):
                if self._is_enough(changed, done):
                    return changed
            if time.monotonic() - opened < pause:  # not allowed to watch, or broken at once
                time.sleep(pause)
                pause = min(1.2 * pause, _LONGEST_PAUSE)

    def _is_enough(self, pod: Mapping[str, Any], done: Callable[[Mapping[str, Any]], bool]) -> bool:
        now = time.monotonic()
        if self._scheduled_at is None and pod["spec"].get("nodeName"):
            self._scheduled_at = now
        waited = now - (self._began if self._scheduled_at is None else self._scheduled_at)
        if done(pod) or is_over(pod) or self.is_hopeless(pod, waited):
            return True
        limit = self.schedule_seconds if self._scheduled_at is None else self.startup_seconds
        if waited > limit:
            raise StartTimeoutError(pod, scheduled=self._scheduled_at is not None)
        if now > self.patience:
            raise StillWaitingError(pod)
        return False

    def _seconds_left(self) -> float:
        """Return after how many seconds something is to be decided even if nothing changes."""
        now = time.monotonic()
        limit = self._began + self.schedule_seconds
        if self._scheduled_at is not None:
            limit = self._scheduled_at + self.startup_seconds
        return max(min(limit - now, self.patience - now, _LONGEST_WATCH_SECONDS), 0.0)


def follow_changes(
    cluster: Cluster, pod: Mapping[str, Any], *, seconds: float
) -> Iterator[Mapping[str, Any]]:
    """Yield the pod whenever it changes, for some ``seconds``; less if the watch breaks or it is deleted.

    The last of a deleted one is how it was at its end.
    """
    meta = pod["metadata"]
    query = {
        "watch": "true",
        "fieldSelector": f"metadata.name={meta['name']}",
        "resourceVersion": meta["resourceVersion"],
        "timeoutSeconds": math.ceil(seconds) or 1,
    }
    rest = b""
    try:
        with cluster.open("pods", query=query, seconds=seconds + _WATCH_ANSWER_SECONDS) as response:
            while data := response.read1(_CHUNK):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    change = json.loads(line)
                    if change["type"] in ("ADDED", "MODIFIED", "DELETED"):
                        yield change["object"]
                    if change["type"] not in ("ADDED", "MODIFIED"):
                        return
    except (ClusterError, ValueError):
        return


class Observer:
    """Sees, beside whoever waits for a pod's step, how the pod changes: gone, it can't be asked why. A context."""

    def __init__(self, cluster: Cluster, pod: Mapping[str, Any]) -> None:
        self._cluster = cluster.again()
        self._pod = pod
        self._over = threading.Event()
        self._gone = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def look(self) -> Mapping[str, Any]:
        """Return how the pod was when it was seen last."""
        return self._pod

    def last(self) -> Mapping[str, Any]:
        """Return how the pod, which is gone, was at its end."""
        self._gone.wait(_LAST_LOOK_SECONDS)
        return self._pod

    def _run(self) -> None:
        meta = self._pod["metadata"]
        while not self._over.is_set():
            for changed in follow_changes(self._cluster, self._pod, seconds=_LONGEST_WATCH_SECONDS):
                if self._over.is_set() or changed["metadata"]["uid"] != meta["uid"]:
                    return
                self._pod = changed
            try:
                found = self._cluster.find("pods", meta["name"])
            except ClusterError:
                self._over.wait(_LONGEST_PAUSE)
                continue
            if found is None or found["metadata"]["uid"] != meta["uid"]:
                self._gone.set()
                return
            self._pod = found


def watch_step(
    cluster: Cluster,
    pod: Mapping[str, Any],
    follower: LogFollower,
    *,
    observer: Observer,
    is_stopped: Callable[[], bool],
    patience: float = PATIENCE_SECONDS,
    until: float = math.inf,
) -> PodEnd:
    """Hand on the step's log until it has ended, and return how.

    Args:
        cluster: The cluster.
        pod: The pod, whose step has begun.
        follower: Hands on the log.
        observer: Sees the pod's last state.
        is_stopped: Whether this worker has told the pod to end: then the end of the log is the step's.
        patience: Seconds that the API server may be away.
        until: A time of :func:`time.monotonic` after which it waits no longer.

    Raises:
        StillWaitingError: It still runs, and it is time for this worker to do something else.
        ClusterLostError: The API server was away for longer than that.
    """
    while True:
        broken = _read(follower, follow=True, until=until)
        if broken:
            time.sleep(_PAUSE_AFTER_BREAK)
        out_of_time = time.monotonic() > until and not is_stopped()
        expect_end = not broken and not is_stopped() and not out_of_time
        found = _look(cluster, pod, patience, expect_end=expect_end)
        if found is None:
            pod = pod if is_stopped() else observer.last()
            state, facts = container_state(pod, STEP)
            return PodEnd(pod, facts if state == "terminated" else None, gone=True)
        pod = found
        state, facts = container_state(pod, STEP)
        if state == "terminated" or is_over(pod):
            break
        if out_of_time:
            raise StillWaitingError(pod)
    if is_leaving(pod) and state != "terminated":
        pod = _read_to_removal(cluster, pod, follower, patience)
    for _ in range(_READS_AFTER_END):
        if not _read(follower, follow=False) or is_leaving(pod):
            break
        time.sleep(_LONGEST_PAUSE)
    follower.finish()
    return PodEnd(pod, facts if state == "terminated" else None, gone=is_leaving(pod))


def _read_to_removal(
    cluster: Cluster, pod: Mapping[str, Any], follower: LogFollower, patience: float
) -> Mapping[str, Any]:
    """Hand on the log of a pod that was told to go; return the pod as it was seen last.

    Its log ends with its last process; its state is told only when the whole pod has ended.
    """
    while _read(follower, follow=True) and not is_lost(pod):
        found, was_away = cluster.find_patiently("pods", pod["metadata"]["name"], patience=patience)
        if found is None and not was_away:
            break
        pod = found if found is not None else pod
        time.sleep(_PAUSE_AFTER_BREAK)
    return pod


def await_removal(cluster: Cluster, name: str, uid: str, *, seconds: float) -> bool:
    """Return whether the pod is gone within ``seconds``."""
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while time.monotonic() < deadline:
        try:
            found = cluster.find("pods", name)
        except ClusterError:
            found = {"metadata": {"uid": uid}}
        if found is None or found["metadata"]["uid"] != uid:
            return True
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
    return False


def _read(follower: LogFollower, *, follow: bool, until: float = math.inf) -> bool:
    """Hand on what there is of the log; return whether the connection broke."""
    try:
        follower.read(follow=follow, until=until)
    except ClusterError:
        return True
    return False


def _look(
    cluster: Cluster, pod: Mapping[str, Any], patience: float, *, expect_end: bool
) -> Mapping[str, Any] | None:
    """Return the pod as it is now; None if it is gone, or another one has its name.

    With ``expect_end``, a step whose log has ended gets a moment to end as well.
    """
    meta = pod["metadata"]
    pause = _FIRST_PAUSE
    deadline = time.monotonic() + (_EXPECTED_END_SECONDS if expect_end else 0.0)
    while True:
        found, _ = cluster.find_patiently("pods", meta["name"], patience=patience)
        if found is None or found["metadata"]["uid"] != meta["uid"]:
            return None
        if (
            container_state(found, STEP)[0] == "terminated"
            or is_over(found)
            or time.monotonic() > deadline
        ):
            return found
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
