"""From the bytes that a program prints to the lines of a log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONGEST_LINE = 64 << 10
"""Bytes; what goes on without a line end for longer comes in pieces."""
PROGRESS_SECONDS = 10.0
"""How often a progress bar, which overwrites itself, shows up in the log."""
_CONTINUATION = 0b10000000
_CONTINUATION_MASK = 0b11000000
_LONGEST_CHARACTER = 4


class LineFolder:
    r"""Makes lines of the chunks that a program's output arrives in.

    A progress bar overwrites its line with ``\r`` many times a second. In the log it becomes its last
    state, and while it lasts, its state at the moment every ten seconds. Bytes that are no UTF-8
    become replacement characters.
    """

    def __init__(
        self,
        *,
        progress_seconds: float = PROGRESS_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rest = b""
        self._progress_seconds = progress_seconds
        self._clock = clock
        self._shown_at: float | None = None

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the lines that ``data`` completes, without their line ends."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = b""
        if lines:
            self._shown_at = None
        for line in lines:
            yield _text(line)
        # A \r at the very end may be half of \r\n: what is before it still stands.
        written, overwrites, _ = rest.rstrip(b"\r").rpartition(b"\r")
        if overwrites:
            rest = rest[len(written) + 1 :]
            yield from self._progress(written)
        while len(rest) > LONGEST_LINE:
            cut = _character_start(rest, LONGEST_LINE)
            yield _text(rest[:cut])
            rest = rest[cut:]
        self._rest = rest

    @property
    def pending(self) -> int:
        """How many bytes of a line without an end wait for its end."""
        return len(self._rest)

    def finish(self) -> Iterator[str]:
        """Yield the last line of an output that does not end with a line end."""
        rest, self._rest = self._rest, b""
        if rest:
            yield _text(rest)

    def _progress(self, written: bytes) -> Iterator[str]:
        now = self._clock()
        if self._shown_at is None:
            self._shown_at = now
        elif written and now - self._shown_at >= self._progress_seconds:
            self._shown_at = now
            yield _text(written)


def _text(line: bytes) -> str:
    if b"\r" in line:
        line = line.rstrip(b"\r").rpartition(b"\r")[2]
    return line.decode("utf-8", "replace")


def _character_start(data: bytes, cut: int) -> int:
    """Return ``cut``, or the start of the UTF-8 character that lies across it."""
    for back in range(_LONGEST_CHARACTER):
        if data[cut - back] & _CONTINUATION_MASK != _CONTINUATION:
            return cut - back
    return cut
