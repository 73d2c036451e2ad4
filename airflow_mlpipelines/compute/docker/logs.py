"""A container's log, followed to its end: every line once, also when the connection breaks on the way.

The daemon keeps the log, with a time at every entry; so a connection that broke, or that a silent
program let grow stale, is opened again a little before the last entry seen, and what was seen already
is left out.
"""

from __future__ import annotations

import struct
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple, Protocol

from airflow_mlpipelines.compute.log_lines import LineFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit

_HEADER = struct.Struct(
    ">BxxxL"
)  # the stream (1: stdout, 2: stderr) and the length of what follows
_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 10.0
_KEPT_SECONDS = 2
_SECOND = len("2026-01-31T12:34:56")
_CLOCK_STEP_SECONDS = 60


class LogConnectionError(Exception):
    """The connection that a log was read from broke, or nothing came for ten seconds."""


class LogEntry(NamedTuple):
    """What the daemon keeps of one write: a line, or a piece of 16 KiB of a longer one."""

    time: str
    stream: int
    data: bytes


class _Readable(Protocol):
    def read(self, amount: int, /) -> bytes: ...


def read_entries(raw: _Readable) -> Iterator[LogEntry]:
    """Yield the entries of a multiplexed log with timestamps; one that was cut short is left out."""
    while True:
        header = raw.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        stream, length = _HEADER.unpack(header)
        payload = raw.read(length)
        if len(payload) < length:
            return
        time, _, data = payload.partition(b" ")
        yield LogEntry(time.decode("ascii", "replace"), stream, data)


class LogPosition:
    """How far a log was read, exact to the entry.

    Times alone are not enough: the pieces of a long line share one, and entries of stdout and stderr
    may lie in the log in the wrong order. So the entries of the last two seconds are counted.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Counter[tuple[str, int]]] = {}
        self._skip: Counter[tuple[str, int]] = Counter()

    def reopen(self) -> int | None:
        """Return since when (in seconds of the epoch) to read anew, or None for the beginning."""
        self._skip = sum(self._seen.values(), Counter())
        return int(_epoch(min(self._seen))) if self._seen else None

    def is_new(self, entry: LogEntry) -> bool:
        """Return whether ``entry`` was not read before, and count it as read."""
        key = (entry.time, entry.stream)
        if self._skip[key] > 0:
            self._skip[key] -= 1
            return False
        second = entry.time[:_SECOND]
        if second not in self._seen and not self._make_room(second):
            return True
        self._seen.setdefault(second, Counter())[key] += 1
        return True

    def _make_room(self, second: str) -> bool:
        """Forget the oldest second for a newer one; return False if ``second`` itself is older."""
        if len(self._seen) < _KEPT_SECONDS:
            return True
        oldest = min(self._seen)
        if second > oldest:
            del self._seen[oldest]
            return True
        if _epoch(oldest) - _epoch(second) < _CLOCK_STEP_SECONDS:
            return False
        self._seen.clear()  # the clock was set back; a line twice is better than lines missing
        return True


class LogFollower:
    """Hands the lines of one container's log on, in order, each of them once."""

    def __init__(self, client: APIClient, container: str, emit: Emit) -> None:
        self._client = client
        self._container = container
        self._emit = emit
        self._position = LogPosition()
        # A folder a stream: a line of the one may arrive in the middle of a line of the other.
        self._folders: dict[int, LineFolder] = {}

    def read(self, *, follow: bool) -> None:
        """Hand on what was not read yet; with ``follow``, until the container ends.

        Raises:
            LogConnectionError: The connection broke. Call it again to go on where it stopped.
        """
        for entry in self._entries(follow=follow):
            if self._position.is_new(entry):
                folder = self._folders.setdefault(entry.stream, LineFolder())
                for line in folder.feed(entry.data):
                    self._emit(line)

    def finish(self) -> None:
        """Hand on the rest of a log whose container has ended."""
        for folder in self._folders.values():
            for line in folder.finish():
                self._emit(line)

    def _entries(self, *, follow: bool) -> Iterator[LogEntry]:
        # Not APIClient.logs(): it drops which stream a piece belongs to, the silence limit, and how
        # much of a frame was there when the connection broke.
        from urllib3.exceptions import HTTPError

        parameters: dict[str, str | int] = {"stdout": 1, "stderr": 1, "timestamps": 1}
        parameters["follow"] = int(follow)
        since = self._position.reopen()
        if since is not None:
            parameters["since"] = since
        try:
            with self._client.get(
                f"{self._client.base_url}/v{self._client.api_version}/containers/{self._container}/logs",
                params=parameters,
                stream=True,
                timeout=(_CONNECT_SECONDS, _SILENCE_SECONDS),
            ) as response:
                response.raise_for_status()
                yield from read_entries(response.raw)
        except (OSError, HTTPError) as error:  # requests' errors are OSErrors
            raise LogConnectionError(str(error)) from error


def _epoch(second: str) -> float:
    return datetime.fromisoformat(second).replace(tzinfo=UTC).timestamp()
