"""Watching a pod: until its step begins, and from there to the step's end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    ClusterError,
    ClusterLostError,
)
from airflow_mlpipelines.compute.kubernetes.pod import STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.logs import LogFollower

ENDED_PHASES = frozenset({"Succeeded", "Failed"})
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_PAUSE_AFTER_BREAK = 0.2
_READS_AFTER_END = 5
_EXPECTED_END_SECONDS = 15.0


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

    def until(self, done: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any] | None:
        """Return the pod once ``done``, or once it is over or hopeless; None if it is gone.

        Raises:
            StartTimeoutError: It took too long.
            ClusterLostError: The API server was away for too long.
            ClusterError: It refuses.
        """
        began = time.monotonic()
        scheduled_at: float | None = None
        pause = _FIRST_PAUSE
        while True:
            pod, _ = self.cluster.find_patiently("pods", self.pod, patience=PATIENCE_SECONDS)
            now = time.monotonic()
            if pod is None:
                return None
            if scheduled_at is None and pod["spec"].get("nodeName"):
                scheduled_at = now
            waited = now - (began if scheduled_at is None else scheduled_at)
            if done(pod) or is_over(pod) or self.is_hopeless(pod, waited):
                return pod
            limit = self.schedule_seconds if scheduled_at is None else self.startup_seconds
            if waited > limit:
                raise StartTimeoutError(pod, scheduled=scheduled_at is not None)
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_PAUSE)


def watch_step(
    cluster: Cluster,
    pod: Mapping[str, Any],
    follower: LogFollower,
    *,
    is_stopped: Callable[[], bool],
    patience: float = PATIENCE_SECONDS,
) -> PodEnd:
    """Hand on the step's log until it has ended, and return how.

    Args:
        cluster: The cluster.
        pod: The pod, whose step has begun.
        follower: Hands on the log.
        is_stopped: Whether this worker has told the pod to end: then the end of the log is the step's.
        patience: Seconds that the API server may be away.

    Raises:
        ClusterLostError: The API server was away for longer than that.
    """
    name = str(pod["metadata"]["name"])
    while True:
        broken = _read(follower, follow=True)
        if broken:
            time.sleep(_PAUSE_AFTER_BREAK)
        found = _look(cluster, pod, patience, expect_end=not broken and not is_stopped())
        if found is None:
            return PodEnd(pod, None, gone=True)
        pod = found
        state, facts = container_state(pod, STEP)
        if state == "terminated" or is_over(pod):
            break
    if is_leaving(pod) and state != "terminated":
        # Its log ends with its last process; its state is told only when the whole pod has ended.
        while _read(follower, follow=True) and cluster.find_patiently(
            "pods", name, patience=patience
        ) != (None, False):
            time.sleep(_PAUSE_AFTER_BREAK)
    for _ in range(_READS_AFTER_END):
        if not _read(follower, follow=False) or is_leaving(pod):
            break
        time.sleep(_LONGEST_PAUSE)
    follower.finish()
    return PodEnd(pod, facts if state == "terminated" else None, gone=is_leaving(pod))


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


def _read(follower: LogFollower, *, follow: bool) -> bool:
    """Hand on what there is of the log; return whether the connection broke."""
    try:
        follower.read(follow=follow)
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


__all__ = [
    "ClusterLostError",
    "PodEnd",
    "StartTimeoutError",
    "StartWatch",
    "await_removal",
    "container_state",
    "find_condition",
    "is_leaving",
    "is_over",
    "watch_step",
]
