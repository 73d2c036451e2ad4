"""Deleting, with patience: a cluster that is busy for a moment keeps nothing of a step for ever."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

DELETE_SECONDS = 15.0
"""How long a deletion is tried."""
_INTERRUPTED_SECONDS = 2.0
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 3.0


@dataclass(frozen=True)
class Thing:
    """What is to be deleted.

    Attributes:
        kind: Such as ``pods``.
        uid: Only this very one; None for whatever has the name.
        seconds: The grace of a pod.
    """

    kind: str
    name: str
    uid: str | None = None
    seconds: int = 0


def delete_all(
    cluster: Cluster, things: Sequence[Thing], *, patience: float = DELETE_SECONDS
) -> None:
    """Have each of the things deleted, whatever becomes of the others; what is gone is fine.

    Args:
        cluster: The cluster.
        things: What to delete, in this order.
        patience: Seconds for which whatever may pass is tried again.

    Raises:
        ClusterError: Something was not deleted: why the first of it was not.
    """
    deadline = time.monotonic() + patience
    pause = _FIRST_PAUSE
    left = list(things)
    failures: dict[Thing, ClusterError] = {}
    while True:
        waiting = []
        for thing in left:
            failures.pop(thing, None)
            try:
                cluster.delete(thing.kind, thing.name, seconds=thing.seconds, uid=thing.uid)
            except ClusterError as error:
                failures[thing] = error
                if error.may_pass:
                    waiting.append(thing)
        left = waiting
        if not left or time.monotonic() + pause > deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    for thing in things:
        if thing in failures:
            raise failures[thing]


def patience_after(error: BaseException) -> float:
    """Return for how long to try to delete after an error: a process that is told to end has seconds."""
    return DELETE_SECONDS if isinstance(error, Exception) else _INTERRUPTED_SECONDS
