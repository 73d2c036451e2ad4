"""A step's log, followed to its end: every line once, also when the connection breaks on the way.

The kubelet keeps the log, with a time at every line; so a connection that broke, or that a silent program
let grow stale, is opened again a little before the last line seen, and what was seen already is left out.
A line that is still being written may break anywhere: then its beginning is left out.
"""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
from airflow_mlpipelines.compute.kubernetes.pod import STEP
from airflow_mlpipelines.compute.log_position import LogEntry, LogPosition
from airflow_mlpipelines.runtime.log_lines import LineFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

_SILENCE_SECONDS = 30.0
_SHORTEST_SILENCE_SECONDS = 1.0
_CHUNK = 64 << 10
_LONGEST_TIME = 64
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


class StepLog:
    """Makes lines of what arrives of one step's log over connections that break: each of them once.

    It reads nothing by itself, so it serves a worker's thread as well as a trigger.
    """

    def __init__(
        self, emit: Callable[[str, str], None], position: Mapping[str, Any] | None = None
    ) -> None:
        """Begin where the log begins, or go on where somebody else has stopped.

        Args:
            emit: Takes the time at which a line was printed, as the kubelet has it, and the line.
            position: What :meth:`to_dict` of whoever read before returned.
        """
        self._emit = emit
        self._folder = LineFolder()
        self._position = LogPosition()
        self._broken: tuple[str, int] | None = None
        self._time = ""
        if position is not None:
            self._position = LogPosition.from_dict(position)
            if position["broken"] is not None:
                time, known = position["broken"]
                self._broken = (str(time), int(known))
        self._reader = _LineReader(self)

    def open(self, *, follow: bool) -> dict[str, str]:
        """Return the query of a new connection, whose answer is for :meth:`feed`."""
        self._reader = _LineReader(self)
        query = {"container": STEP, "timestamps": "true", "follow": "true" if follow else "false"}
        since = self._position.reopen()
        if since is not None:
            query["sinceTime"] = _rfc3339(since)
        return query

    def feed(self, data: bytes) -> None:
        """Hand on the lines that ``data`` completes."""
        self._reader.feed(data)

    def close(self) -> None:
        """The connection has ended, perhaps in the middle of a line."""
        self._reader.stop()

    def finish(self) -> None:
        """Hand on the rest of a log whose step has ended."""
        for line in self._folder.finish():
            self._emit(self._time, line)

    def to_dict(self) -> dict[str, Any]:
        """Return, after :meth:`close`, where somebody else is to go on: a small JSON form.

        Of a line without an end, what was not handed on yet is read again.
        """
        broken = None
        if self._broken is not None:
            time, known = self._broken
            broken = [time, known - self._folder.pending]
        return {**self._position.to_dict(), "broken": broken}

    def begin_line(self, time: str) -> int | None:
        """Return how many bytes of the line that begins here are known; None if it is known as a whole."""
        if not self._position.is_new(LogEntry(time, 0, b"")):
            return None
        self._time = time
        if self._broken is None or self._broken[0] != time:
            return 0
        (_, known), self._broken = self._broken, None
        return known

    def take(self, data: bytes) -> None:
        """Hand on a piece of the log."""
        for line in self._folder.feed(data):
            self._emit(self._time, line)

    def break_line(self, time: str, known: int) -> None:
        """Remember that a line was read only in part."""
        self._position.forget(LogEntry(time, 0, b""))
        self._broken = (time, known)


class AscendingTimes:
    """Hands lines on with times of which each is later than the one before, and later than a moment.

    A worker logs a line when it comes to it, a trigger with the time at which it was printed: that may be earlier, and
    whoever sorts a log by its times would get the trigger's first lines before the worker's last ones. Read again,
    the same lines get the same times.
    """

    def __init__(self, emit: Callable[[str, str], None], *, after: str) -> None:
        """Prepare.

        Args:
            emit: Takes the time and the line.
            after: The moment, as an ISO time.
        """
        self._emit = emit
        self._last = datetime.fromisoformat(after)

    def __call__(self, time: str, line: str) -> None:
        """Take the time at which a line was printed, and the line."""
        self._last = max(datetime.fromisoformat(time), self._last + timedelta(microseconds=1))
        self._emit(self._last.isoformat(), line)


class LogFollower:
    """Hands the lines of one container of a pod on, in order, each of them once."""

    def __init__(
        self,
        cluster: Cluster,
        pod: str,
        emit: Emit,
        position: Mapping[str, Any] | None = None,
        *,
        container: str = STEP,
    ) -> None:
        self._cluster = cluster
        self._pod = pod
        self._container = container
        self._log = StepLog(lambda _time, line: emit(line), position)

    def read(self, *, follow: bool, until: float = math.inf) -> None:
        """Hand on what was not read yet; with ``follow``, until the step ends or it is ``until`` o'clock.

        Args:
            follow: Whether to wait for more.
            until: A time of :func:`time.monotonic`.

        Raises:
            ClusterError: The connection broke. Call it again to go on where it stopped.
        """
        query = {**self._log.open(follow=follow), "container": self._container}
        seconds = min(_SILENCE_SECONDS, max(until - time.monotonic(), _SHORTEST_SILENCE_SECONDS))
        try:
            with self._cluster.open(
                f"pods/{self._pod}/log", query=query, seconds=seconds
            ) as response:
                while data := response.read1(_CHUNK):
                    self._log.feed(data)
                    if time.monotonic() > until:
                        return
        finally:
            self._log.close()

    def finish(self) -> None:
        """Hand on the rest of a log whose step has ended."""
        self._log.finish()

    def to_dict(self) -> dict[str, Any]:
        """Return where somebody else is to read on."""
        return self._log.to_dict()


def read_tail(cluster: Cluster, pod: str, *, lines: int) -> tuple[str, ...]:
    """Return the last lines of a step's log; none if it can't be read any more."""
    query = {"container": STEP, "tailLines": str(lines)}
    try:
        with cluster.open(f"pods/{pod}/log", query=query, seconds=_SILENCE_SECONDS) as response:
            folder, read = LineFolder(), response.read()
    except ClusterError:
        return ()
    return (*folder.feed(read), *folder.finish())


class _LineReader:
    """Parts what arrives into lines with their times, also while a line is still being written."""

    def __init__(self, follower: StepLog) -> None:
        self._follower = follower
        self._time: str | None = None
        self._head = b""
        self._skip: int | None = 0
        self._known = 0

    def feed(self, data: bytes) -> None:
        while data:
            if self._time is None:
                self._head += data
                time, blank, data = self._head.partition(b" ")
                if not blank:
                    if len(self._head) > _LONGEST_TIME:  # the kubelet says something of its own
                        self._head = b""
                    return
                self._head = b""
                self._time = time.decode("ascii", "replace")
                is_entry = _TIME.match(self._time) is not None
                # Else it is the kubelet that says it can't read the log, in the place of a line.
                self._skip = self._follower.begin_line(self._time) if is_entry else None
                self._known = 0
            line, end, rest = data.partition(b"\n")
            self._take(line + end)
            if end:
                self._time = None
            data = rest

    def stop(self) -> None:
        """The connection has ended, perhaps in the middle of a line."""
        if self._time is not None and self._skip is not None:
            self._follower.break_line(self._time, max(self._known, self._skip))
        self._time = None

    def _take(self, data: bytes) -> None:
        start, self._known = self._known, self._known + len(data)
        if self._skip is None:
            return
        new = data[max(self._skip - start, 0) :]
        if new:
            self._follower.take(new)


def _rfc3339(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
