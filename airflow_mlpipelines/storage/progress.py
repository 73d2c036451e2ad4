"""How far a transfer is, in words for its log."""

from __future__ import annotations

import threading
import time

from airflow_mlpipelines._units import show_size

_REPORT_SECONDS = 5.0


class Progress:
    """How far a transfer is; many threads count.

    Args:
        files: How many there are.
        size: Their bytes.
    """

    def __init__(self, files: int, size: int) -> None:
        self._files, self._size = files, size
        self._lock = threading.Lock()
        self._started = self._reported = time.monotonic()
        self.done = self.passed = 0

    def add(self, *, files: int = 0, size: int = 0) -> None:
        """Count what has come."""
        with self._lock:
            self.done += files
            self.passed += size

    def describe(self) -> str:
        """Return how much of it is done, and how fast, as in ``1 of 2 files, 1.0 MiB of 9.0 MiB, 1.0 MiB/s``."""
        rate = self.passed / max(time.monotonic() - self._started, 1e-3)
        return (
            f"{self.done} of {self._files} files, {show_size(self.passed)} of "
            f"{show_size(self._size)}, {show_size(rate)}/s"
        )

    def is_due(self) -> bool:
        """Whether it is time for another line."""
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS:
            return False
        self._reported = now
        return True
