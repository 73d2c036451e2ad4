"""How far a log with a time at every entry was read, so that reading can go on after a broken connection."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEPT_SECONDS = 2
_MOST_KEPT = 20_000
_HANDED_ON = 20
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
    may lie in the log in the wrong order. So the entries of the last two seconds are counted, or of a log
    that comes thick and fast the last thousands: whatever is older than those was read.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Counter[tuple[str, int]]] = {}
        self._kept = 0
        self._floor = ""
        self._skip: Counter[tuple[str, int]] = Counter()
        self._left = 0

    def reopen(self) -> int | None:
        """Return since when (in seconds of the epoch) to read anew, or None for the beginning."""
        self._skip = sum(self._seen.values(), Counter())
        self._left = self._skip.total()
        return int(_epoch(min(self._seen))) if self._seen else None

    def is_new(self, entry: LogEntry) -> bool:
        """Return whether ``entry`` was not read before, and count it as read."""
        key = (entry.time, entry.stream)
        if self._left:
            if entry.time < self._floor:
                return False
            if self._skip[key] > 0:
                self._skip[key] -= 1
                self._left -= 1
                return False
        second = entry.time[:_SECOND]
        if second not in self._seen and not self._make_room(second):
            return True
        self._seen.setdefault(second, Counter())[key] += 1
        self._kept += 1
        if self._kept > _MOST_KEPT:
            self._keep_newest(_MOST_KEPT // 2)
        return True

    def forget(self, entry: LogEntry) -> None:
        """Count ``entry``, which was new, as not read: only its beginning has arrived."""
        second = entry.time[:_SECOND]
        if second in self._seen:
            self._seen[second][entry.time, entry.stream] -= 1

    def to_dict(self) -> dict[str, Any]:
        """Return a small JSON form, for somebody else to read on from here."""
        entries = self._newest(_HANDED_ON)
        cut = len(entries) < len(self._newest(self._kept))
        return {
            "floor": entries[0][0] if cut else self._floor,
            "entries": [[time, stream, count] for time, stream, count in entries],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LogPosition:
        """Return the position that :meth:`to_dict` has written."""
        position = cls()
        position._floor = str(data["floor"])
        for time, stream, count in data["entries"]:
            position._seen.setdefault(time[:_SECOND], Counter())[time, stream] = count
            position._kept += count
        return position

    def _newest(self, most: int) -> list[tuple[str, int, int]]:
        """Return the newest entries with their numbers, oldest first; of one time all streams, or none."""
        entries = sorted(
            (time, stream, count)
            for counts in self._seen.values()
            for (time, stream), count in counts.items()
            if count > 0
        )
        if len(entries) <= most:
            return entries
        edge = entries[-most - 1][0]
        return [entry for entry in entries if entry[0] > edge]

    def _keep_newest(self, most: int) -> None:
        kept = self._newest(most)
        self._seen = {}
        for time, stream, count in kept:
            self._seen.setdefault(time[:_SECOND], Counter())[time, stream] = count
        self._kept = sum(count for _, _, count in kept)
        self._floor = kept[0][0]

    def _make_room(self, second: str) -> bool:
        """Forget the oldest second for a newer one; return False if ``second`` itself is older."""
        if len(self._seen) < _KEPT_SECONDS:
            return True
        oldest = min(self._seen)
        if second > oldest:
            self._kept -= self._seen.pop(oldest).total()
            return True
        if _epoch(oldest) - _epoch(second) < _CLOCK_STEP_SECONDS:
            return False
        # the clock was set back; a line twice is better than lines missing
        self._seen.clear()
        self._kept, self._floor = 0, ""
        return True


def _epoch(second: str) -> float:
    return datetime.fromisoformat(second).replace(tzinfo=UTC).timestamp()
