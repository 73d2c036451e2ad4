"""The processes that a gang starts on its node: what they print, their end, and ending them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines.runtime.log_lines import LineFolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import IO

LOGS = "logs"
SIGNALLED = 128
POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
_AFTERMATH_SECONDS = 1.0
_TAIL_LINES = 20
_TAIL_CHARACTERS = 2000
_CHUNK = 64 << 10


_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Let this process be killed when the one that has started it is, as MPICH does with those of its ranks."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class NotStartedError(Exception):
    """A program is not there, or may not be run."""


class Program:
    """A process with a session of its own, which prints where this one does.

    Attributes:
        decides: Whether the gang is done only when this has ended well.
    """

    decides = True

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        *,
        output: int | None = None,
        inherit: bool = False,
    ) -> None:
        """Start it; with ``inherit``, it gets the files that this process was given open, and dies with it.

        Raises:
            NotStartedError: It can't be started.
        """
        self._ended: float | None = None
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                close_fds=not inherit,
                preexec_fn=_die_with_parent if inherit else None,  # noqa: PLW1509 - no thread yet
                start_new_session=True,  # so that it can be ended with all that it has started
            )
        except OSError as error:
            raise NotStartedError(
                f"{command[0]!r} could not be started: {error.strerror or error}"
            ) from error

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with another exit code than 0.

        What only serves others may break when they have ended well: that shows in a moment.
        """
        if not self.code:
            return False
        if self._ended is None:
            self._ended = time.monotonic()
        return self.decides or time.monotonic() - self._ended > _AFTERMATH_SECONDS

    @property
    def code(self) -> int | None:
        """Its exit code, as a shell has it (128 and more for a signal); None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else SIGNALLED - code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it has started in its session."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def finish(self) -> None:
        """Wait a moment for the rest of what it printed."""


class Rank(Program):
    """One process of the gang, with a thread that takes in what it prints."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: dict[str, str],
        *,
        inherit: bool = False,
    ) -> None:
        self.number = number
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        super().__init__(command, environment, output=subprocess.PIPE, inherit=inherit)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait a moment for the rest of what it printed."""
        self._thread.join(_GRACE_SECONDS)

    def _read(self) -> None:
        output: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        folder = LineFolder()
        kept = _KeptLog(Path(LOGS, f"std_log_process_{self.number}.txt"))
        while data := os.read(output.fileno(), _CHUNK):
            kept.write(data)
            self._hand_on(folder.feed(data))
        self._hand_on(folder.finish())
        kept.close()

    def _hand_on(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.tail.append(line[:_TAIL_CHARACTERS])
            _print(f"[rank {self.number}] {line}".encode("utf-8", "replace"))


class _KeptLog:
    """A rank's own output, byte for byte. If it can't be kept, that is said once, and the rank goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            self._give_up(error)

    def write(self, data: bytes) -> None:
        """Add to it."""
        try:
            if self._file is not None:
                self._file.write(data)
        except OSError as error:
            self.close()
            self._give_up(error)

    def close(self) -> None:
        """Add no more."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _give_up(self, error: OSError) -> None:
        self._file = None
        say(f"{self._path} can't be written: {error.strerror}")


_printing = threading.Lock()


def _print(line: bytes) -> None:
    """Write one line whole, whatever other ranks print at the same time."""
    with _printing:
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


def say(text: str) -> None:
    """Print a line of the gang's own."""
    _print(text.encode("utf-8", "replace"))


def wait(programs: Sequence[Program]) -> Program | None:
    """Return the first that fails, or None when all that decide have ended well."""
    while True:
        failed = find_failed(programs)
        if failed is not None or are_done(programs):
            return failed
        time.sleep(POLL_SECONDS)


def are_done(programs: Sequence[Program]) -> bool:
    """Return whether all that decide have ended well."""
    return all(program.code == 0 for program in programs if program.decides)


def find_failed(programs: Sequence[Program]) -> Program | None:
    """Return one that has ended with another exit code than 0, or None."""
    return next((program for program in programs if program.has_failed), None)


@contextmanager
def ending(programs: Sequence[Program]) -> Iterator[None]:
    """End what still runs of ``programs`` at the end of the block."""
    try:
        yield
    finally:
        end(programs)


def end(programs: Sequence[Program]) -> None:
    """End what still runs: five seconds after SIGTERM, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [program for program in programs if program.code is None]
        for program in running:
            program.signal(number)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and any(program.code is None for program in running):
            time.sleep(POLL_SECONDS)
    for program in programs:
        program.finish()
