"""Stopping a step in the few seconds that Airflow leaves for it, though the API server be slow, or away for some of them."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.cluster import CONFLICT, NOT_FOUND, ClusterError
from airflow_mlpipelines.compute.kubernetes.lifetime import KILL_SECONDS, belongs_to

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

_SECONDS = 4.0
"""Airflow ends a process five seconds after it has told it to end."""
_NEXT_SECONDS = 0.7
_ANSWER_SECONDS = 3.0


def persist(do: Callable[[], object]) -> None:
    """Call ``do`` until it succeeds once, each time in a thread of its own; return then, or when time is up.

    The next call does not wait for one that hangs. This is for signal handlers: what the thread that was interrupted
    holds, a call may wait for in vain, but nobody waits for the call.
    """
    done = threading.Event()

    def call() -> None:
        with suppress(ClusterError):
            do()
            done.set()

    deadline = time.monotonic() + _SECONDS
    while not done.is_set() and time.monotonic() < deadline:
        threading.Thread(target=call, daemon=True).start()
        done.wait(min(_NEXT_SECONDS, max(0.0, deadline - time.monotonic())))


def delete_own(
    cluster: Cluster, kind: str, name: str, *, token: str, seen: Mapping[str, Any] | None
) -> bool:
    """Have a pod or Job deleted if it is this try's; return whether it was.

    One that nobody has changed since this try has seen it goes by one request; no other try has adopted it then.

    Args:
        cluster: The cluster.
        kind: ``pods`` or ``jobs``.
        name: Its name.
        token: A word that only this try knows.
        seen: How it was when it was seen last; None if this try does not know.

    Raises:
        ClusterError: The API server refuses, or does not answer in time.
    """
    path = f"{kind}/{name}"
    try:
        while True:
            found = seen or cluster.ask("GET", path, seconds=_ANSWER_SECONDS)
            if not belongs_to(found, token):
                return False
            meta = found["metadata"]
            conditions = {key: meta[key] for key in ("uid", "resourceVersion")}
            body = {
                "gracePeriodSeconds": KILL_SECONDS,
                "propagationPolicy": "Background",
                "preconditions": conditions,
            }
            try:
                cluster.ask("DELETE", path, body=body, seconds=_ANSWER_SECONDS)
            except ClusterError as error:
                if error.status != CONFLICT:
                    raise
                seen = None
            else:
                return True
    except ClusterError as error:
        if error.status == NOT_FOUND:
            return False
        raise
