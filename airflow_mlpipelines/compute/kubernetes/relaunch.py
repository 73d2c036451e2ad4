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
_POD, _JOB, _AWAITS, _RELAUNCHES = "pod", "job", "awaits", "relaunches"
_QUEUED_AT = "queued_at"


class PodNote:
    """What is noted of a step run beyond its worker's life: its pod, what that waits for, how many were lost.

    Attributes:
        pod: The ``uid`` of the pod; None while there is none.
        job: The ``uid`` of the Job, of a step on several nodes; None while there is none.
        awaits: What a pod that was left to itself wants next; None of one that a worker attends to.
        relaunches: How many pods this try has lost.
        queued_at: Since when there has been no room for it, in seconds of the epoch; None once there is some.
    """

    def __init__(self, handle: HandleStore) -> None:
        self._handle = handle
        noted: dict[str, Any] = handle.get() or {}
        self.pod: str | None = noted.get(_POD)
        self.job: str | None = noted.get(_JOB)
        self.awaits: str | None = noted.get(_AWAITS)
        self.relaunches = int(noted.get(_RELAUNCHES, 0))
        self.queued_at: float | None = noted.get(_QUEUED_AT)

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a pod nor a Job."""
        return self.pod is None and self.job is None

    def set(self, pod: str | None, *, job: str | None = None, awaits: str | None = None) -> None:
        """Note the pod or the Job, beside how many were lost before it."""
        self.pod, self.job, self.awaits, self.queued_at = pod, job, awaits, None
        self._write()

    def queue(self, since: float) -> None:
        """Note that there is no room for it, ``since`` when, in seconds of the epoch."""
        self.queued_at = since
        self._write()

    def _write(self) -> None:
        fields = {
            _POD: self.pod,
            _JOB: self.job,
            _AWAITS: self.awaits,
            _RELAUNCHES: self.relaunches or None,
            _QUEUED_AT: self.queued_at,
        }
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
