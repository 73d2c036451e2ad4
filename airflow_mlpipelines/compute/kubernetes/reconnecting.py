"""Going on with a pod over connections that break, or that its node does not take for a while.

What a pod holds may be the only copy of what took it a day. So connections are made again for as long as they bring
anything further, and then for as long as an API server that is away would be waited for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._units import show_duration
from airflow_mlpipelines.compute.kubernetes.channel import ChannelError, CommandError
from airflow_mlpipelines.compute.kubernetes.cluster import (
    FORBIDDEN,
    PATIENCE_SECONDS,
    PodUnreachableError,
)
from airflow_mlpipelines.compute.kubernetes.watch import container_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

_ATTEMPTS = 4
"""How often a command may fail in a pod that can be reached."""
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 10.0


class Progress:
    """How far files got over connections that break, and when they last got further than ever before.

    A part that starts over with each connection thus gets nowhere if each breaks at the same place.
    """

    def __init__(self) -> None:
        self._furthest: dict[str, int] = {}
        self._done: set[str] = set()
        self.at = time.monotonic()

    def note(self, part: str, amount: int) -> None:
        """Take note of how much of a part has passed over this connection."""
        if amount > self._furthest.get(part, 0):
            self._furthest[part] = amount
            self.touch()

    def touch(self) -> None:
        """Take note that something has got further."""
        self.at = time.monotonic()

    def once(self, part: str, do: Callable[[], object]) -> None:
        """Do a part, unless it was done over an earlier connection."""
        if part not in self._done:
            do()
            self._done.add(part)
            self.touch()


def see_through(
    cluster: Cluster,
    name: str,
    container: str,
    action: Callable[[], None],
    progress: Progress,
    is_done: Callable[[Mapping[str, Any] | None], bool],
) -> None:
    """Do ``action`` until it succeeds, as long as the container runs; an absent cluster is waited for.

    Args:
        cluster: The cluster.
        name: The pod's name.
        container: The container that ``action`` has to do with.
        action: Is done again after a :class:`ChannelError`.
        progress: Told by ``action`` how far it gets.
        is_done: Whether the pod (None if it is gone) shows that the action has succeeded, but for its answer.

    Raises:
        CommandError: It fails time and again in a pod that can be reached, or pod or container have ended.
        ClusterError: The API server refuses.
        PodUnreachableError: It got no further for too long.
        ClusterLostError: The API server was away for too long.
    """
    failures = 0
    pause = _FIRST_PAUSE
    while True:
        began = time.monotonic()
        try:
            return action()
        except ChannelError as error:
            pod, _ = cluster.find_patiently("pods", name, patience=PATIENCE_SECONDS)
            if is_done(pod):
                return None
            _check_pod(error, pod, name, container)
            failures += isinstance(error, CommandError)
            if failures >= _ATTEMPTS:
                raise
            if time.monotonic() - progress.at > PATIENCE_SECONDS:
                raise PodUnreachableError(
                    f"for {show_duration(PATIENCE_SECONDS)}, nothing got through to container {container!r} of pod "
                    f"{name!r}, which runs: {error}"
                ) from error
        if progress.at > began:
            pause = _FIRST_PAUSE
        time.sleep(pause)
        pause = min(pause + 1.0, _LONGEST_PAUSE)


def _check_pod(
    error: ChannelError, pod: Mapping[str, Any] | None, name: str, container: str
) -> None:
    """Return if the same may succeed over another connection."""
    if error.status == FORBIDDEN:
        raise error
    if pod is None:
        raise CommandError(f"pod {name!r} is gone. {error}") from error
    if container_state(pod, container)[0] != "running":
        raise CommandError(f"its container {container!r} has ended. {error}") from error
