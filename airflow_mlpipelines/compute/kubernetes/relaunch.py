"""Launching a step again whose pod the cluster took away: a budget of its own, which costs no retry of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import RelaunchError

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import HandleStore
    from airflow_mlpipelines.compute.kubernetes.failures import PodLostError

BUDGET = 5
"""How often a try launches its step again."""
_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 60.0
_LAUNCHER = "kubernetes"
_POD, _AWAITS, _RELAUNCHES = "pod", "awaits", "relaunches"


class PodNote:
    """What is noted of a step run beyond its worker's life: its pod, what that waits for, how many were lost.

    Attributes:
        pod: The ``uid`` of the pod; None while there is none.
        awaits: What a pod that was left to itself wants next; None of one that a worker attends to.
        relaunches: How many pods this try has lost.
    """

    def __init__(self, handle: HandleStore) -> None:
        self._handle = handle
        noted: dict[str, Any] = handle.get() or {}
        self.pod: str | None = noted.get(_POD)
        self.awaits: str | None = noted.get(_AWAITS)
        self.relaunches = int(noted.get(_RELAUNCHES, 0))

    def set(self, pod: str | None, *, awaits: str | None = None) -> None:
        """Note the pod, beside how many were lost before it."""
        self.pod, self.awaits = pod, awaits
        fields = {_POD: pod, _AWAITS: awaits, _RELAUNCHES: self.relaunches or None}
        found = {key: value for key, value in fields.items() if value is not None}
        self._handle.set({"launcher": _LAUNCHER, **found} if found else None)

    def forget(self) -> None:
        """Note that there is nothing any more."""
        self.relaunches = 0
        self.set(None)

    def charge(self, lost: PodLostError) -> RelaunchError | None:
        """Return what to raise for the next launch, and count it; None if there were enough."""
        if self.relaunches >= BUDGET:
            self.forget()
            return None
        self.relaunches += 1
        self.set(None)
        return RelaunchError(
            f"The cluster took its pod away ({lost.why}); launched again ({self.relaunches} of {BUDGET})",
            pause=min(_FIRST_PAUSE * 2 ** (self.relaunches - 1), _LONGEST_PAUSE),
        )
