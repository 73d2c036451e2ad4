"""How far a log with a time at every entry was read, so that reading can go on after a broken connection."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import NamedTuple

_KEPT_SECONDS = 2
_SECOND = len("2026-01-31T12:34:56")
_CLOCK_STEP_SECONDS = 60


class LogEntry(NamedTuple):
    """What is kept of one write: a line, or of a long one perhaps a piece."""

    time: str
    stream: int  # 1: stdout, 2: stderr; 0 where they are not told apart
    data: bytes


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

    def forget(self, entry: LogEntry) -> None:
        """Count ``entry``, which was new, as not read: only its beginning has arrived."""
        second = entry.time[:_SECOND]
        if second in self._seen:
            self._seen[second][entry.time, entry.stream] -= 1

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


def _epoch(second: str) -> float:
    return datetime.fromisoformat(second).replace(tzinfo=UTC).timestamp()
