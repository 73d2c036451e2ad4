"""A container's log, followed to its end: every line once, also when the connection breaks on the way.

The daemon keeps the log, with a time at every entry; so a connection that broke, or that a silent
program let grow stale, is opened again a little before the last entry seen, and what was seen already
is left out.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

from airflow_mlpipelines.compute.log_position import LogEntry, LogPosition
from airflow_mlpipelines.runtime.log_lines import LineFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit

_HEADER = struct.Struct(
    ">BxxxL"
)  # the stream (1: stdout, 2: stderr) and the length of what follows
_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 10.0


class LogConnectionError(Exception):
    """The connection that a log was read from broke, or nothing came for ten seconds."""


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
