"""Watching a container to its end, across broken connections and a daemon that is away for a while."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.docker.daemon import find_container
from airflow_mlpipelines.compute.docker.logs import LogConnectionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from docker import APIClient

    from airflow_mlpipelines.compute.docker.logs import LogFollower

ALIVE = frozenset({"running", "paused", "restarting"})
ENDED = frozenset({"exited", "dead"})
PATIENCE_SECONDS = 600.0
"""How long a daemon may be away before a step gives up on it."""
_READS_AFTER_END = 5
_PAUSE_AFTER_BREAK = 0.1
_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 2.0


@dataclass(frozen=True)
class ContainerEnd:
    """How a container ended.

    Attributes:
        state: What the daemon says of it; None if the container is gone.
        daemon_was_away: Whether the daemon was lost on the way, and the container perhaps with it.
    """

    state: Mapping[str, Any] | None
    daemon_was_away: bool = False


class DaemonLostError(Exception):
    """The daemon has not answered for ten minutes."""


def watch_container(
    client: APIClient, container: str, follower: LogFollower, *, patience: float = PATIENCE_SECONDS
) -> ContainerEnd:
    """Hand on the container's log until it has ended, and return how.

    Raises:
        DaemonLostError: The daemon was away for longer than ``patience`` seconds.
    """
    was_away = False
    while True:
        broken = _read(follower, follow=True)
        if broken:
            time.sleep(
                _PAUSE_AFTER_BREAK
            )  # a log that can't be read at all must not be asked for all the time
        found, waited = _inspect(client, container, patience, expect_end=not broken)
        was_away |= waited
        if found is None:
            return ContainerEnd(None, was_away)
        if found["State"]["Status"] not in ALIVE:
            break
    # The daemon may close a log that is followed before its last lines: read on from the last one seen.
    for _ in range(_READS_AFTER_END):
        if not _read(follower, follow=False):
            break
        time.sleep(_LONGEST_PAUSE)
    follower.finish()
    return ContainerEnd(found["State"], was_away)


def _read(follower: LogFollower, *, follow: bool) -> bool:
    """Hand on what there is of the log; return whether the connection broke."""
    try:
        follower.read(follow=follow)
    except LogConnectionError:
        return True
    return False


def _inspect(
    client: APIClient, container: str, patience: float, *, expect_end: bool
) -> tuple[dict[str, Any] | None, bool]:
    """Return what the daemon knows of the container, and whether it had to be waited for.

    With ``expect_end``, a container whose log has ended gets a moment to end as well.
    """
    waited = False
    pause = _FIRST_PAUSE
    deadline = time.monotonic() + patience
    while True:
        try:
            found = find_container(client, container)
        except OSError as error:  # docker's and requests' errors are OSErrors
            waited = True
            if time.monotonic() > deadline:
                raise DaemonLostError(str(error)) from error
        else:
            ending = expect_end and pause < _LONGEST_PAUSE
            if found is None or found["State"]["Status"] not in ALIVE or not ending:
                return found, waited
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
