"""The guardian: the process between a worker and a step's program, so that neither outlives the other.

A process group is not enough to end a program: whatever calls ``setsid`` or forks twice leaves it. And
a worker that is killed with SIGKILL ends nothing at all. So the worker forks a guardian, and the
guardian starts the program:

* It is the *subreaper* of all it starts. However a process detaches itself, it stays below the
  guardian, which is done only when the kernel says that it has no child left.
* It holds the reading end of a pipe, the lifeline, whose other end is the worker's alone. When the worker
  dies, in whatever way, the lifeline ends, and the guardian ends the program. Unlike a parent-death
  signal this reaches every descendant, and does not depend on which thread had started what.
* The time limit is its own, so it holds while the worker is busy or stopped.

Why a fork without an exec: an interpreter of its own would cost every step 10 ms or more, ``preexec_fn``
is the same fork and covers the program's first process only, and a binary would have to be built. A
forked guardian does nothing but system calls: it takes no lock that another thread of the worker may
have held, logs nothing, imports nothing, collects no garbage, and keeps no file of the worker's open
but those that it is told to hold for as long as anything of the program lives: the locks of its GPUs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from airflow_mlpipelines.compute.processes import descendants, start_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

GRACE_SECONDS = 2.0
"""What a program has to end by itself after SIGTERM. Airflow leaves five seconds for everything."""
_GIVE_UP_SECONDS = 10.0
_POLL_SECONDS = 0.02
_GO, _STOP = b"g", b"s"
_END = b"\n"
_CHUNK = 64 << 10
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_NAME = b"mlp-guardian"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_KIB = 1024
_MOST_FILES = 1 << 16
# Looked up here: after the fork, another thread may have left the dynamic linker's lock taken.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@dataclass(frozen=True)
class Program:
    """What the guardian starts.

    Attributes:
        directory: The working directory.
        timeout_seconds: It is ended after this long.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    directory: str
    timeout_seconds: float | None = None


@dataclass(frozen=True)
class ProgramEnd:
    """How a program ended.

    Attributes:
        exit_code: Its exit code; minus the signal's number if a signal ended it. None if it did not
            start, or its guardian was killed.
        cause: Why the guardian ended it, if it did.
        start_error: Why it could not be started.
        peak_memory: Bytes that the largest of its processes had in memory; 0 if not known.
        survivors: Processes that could not be killed.
    """

    exit_code: int | None = None
    cause: Literal["timeout", "stopped"] | None = None
    start_error: str | None = None
    peak_memory: int = 0
    survivors: tuple[int, ...] = ()


class Guardian:
    """The worker's side: a guardian that has been forked, and waits for :meth:`go`.

    Args:
        program: What it starts.
        held: Open files of the worker that the guardian, the program, and what that starts have open too.
    """

    def __init__(self, program: Program, *, held: Sequence[int] = ()) -> None:
        output = os.pipe()
        report = os.pipe()
        lifeline = os.pipe()
        with warnings.catch_warnings():
            # Python warns of forks in processes with threads; the module says why this one is sound.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _guard_and_exit(
                program, lifeline=lifeline[0], report=report[1], output=output[1], held=held
            )
        for inherited in (output[1], report[1], lifeline[0]):
            os.close(inherited)
        self.pid = pid
        self.started = start_time(pid)
        self._output, self._report, self._lifeline = output[0], report[0], lifeline[1]
        # A signal handler may call stop() in the middle of anything that this same thread does.
        self._lock = threading.RLock()
        self._over = False

    def go(self) -> None:
        """Let it start the program."""
        self._tell(_GO)

    def stop(self) -> None:
        """Have the program ended: SIGTERM to all of it, two seconds, SIGKILL. Returns at once."""
        self._tell(_STOP)

    def read_output(self) -> Iterator[bytes]:
        """Yield what the program prints, as soon as it is there, until it is over."""
        os.set_blocking(self._output, False)
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        poll.register(self._report, select.POLLIN)
        over = False
        while True:
            try:
                data = os.read(self._output, _CHUNK)
            except BlockingIOError:
                if over:  # somebody who could not be killed still holds the other end
                    return
                over = any(file == self._report for file, _ in poll.poll())
                continue
            if not data:
                return
            yield data

    def wait(self) -> ProgramEnd:
        """Return how the program ended, once nothing of it is running any more."""
        text = b""
        while not text.endswith(_END) and (more := os.read(self._report, _CHUNK)):
            text += more
        # Beside what comes next: giving back the memory that it was forked with takes it milliseconds.
        threading.Thread(target=_reap, args=(self.pid,), name="guardian-end", daemon=True).start()
        if not text:
            return ProgramEnd()
        said = json.loads(text)
        return ProgramEnd(**{**said, "survivors": tuple(said["survivors"])})

    def close(self) -> None:
        """Let go of it. A program that still runs is ended, and not waited for."""
        with self._lock:
            if not self._over:
                self._over = True
                for file in (self._output, self._report, self._lifeline):
                    os.close(file)

    def _tell(self, word: bytes) -> None:
        with self._lock, suppress(BrokenPipeError):
            if not self._over:
                os.write(self._lifeline, word)


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


# ---- the guardian's own side: after the fork, until it exits ------------------------------------


def _guard_and_exit(
    program: Program, *, lifeline: int, report: int, output: int, held: Sequence[int]
) -> NoReturn:
    status = 1
    try:
        gc.disable()  # a finalizer of the worker's objects may do anything, such as close our files
        os.setsid()
        wakeup = _listen_to_signals()
        _keep_files(lifeline, report, output, *wakeup, *held)
        _become_subreaper()
        if os.read(lifeline, 1) == _GO:
            end = _guard(program, lifeline, wakeup[0], output, held)
            for file in held:  # before the worker learns of the end, and begins what comes next
                os.close(file)
            os.write(report, json.dumps(asdict(end)).encode() + _END)
        status = 0
    finally:
        os._exit(status)


def _listen_to_signals() -> tuple[int, int]:
    """Return a pipe of which one end becomes readable when a child ends or a signal asks to stop."""
    reader, writer = os.pipe()
    for file in (reader, writer):
        os.set_blocking(file, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_SIGNALS):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return reader, writer


def _keep_files(*kept: int) -> None:
    """Close every file of the worker's; its sockets would seem open to others after its death."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    start = 3
    for file in sorted(kept):
        os.closerange(start, file)
        start = file + 1
    os.closerange(start, max(os.sysconf("SC_OPEN_MAX"), _MOST_FILES))


def _become_subreaper() -> None:
    if _prctl is not None:
        _prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _guard(
    program: Program, lifeline: int, wakeup: int, output: int, held: Sequence[int]
) -> ProgramEnd:
    try:
        process = subprocess.Popen(
            program.argv,
            env=program.env,
            cwd=program.directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=held,
        )
    except (OSError, ValueError) as error:
        return ProgramEnd(start_error=_describe(error))
    os.close(output)
    return _Watch(process.pid, program.timeout_seconds).until_over(lifeline, wakeup)


def _describe(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)


class _Watch:
    """Watches over one program and all that it starts."""

    def __init__(self, program: int, timeout_seconds: float | None) -> None:
        self._program = program
        self._exit_code: int | None = None
        self._cause: Literal["timeout", "stopped"] | None = None
        now = time.monotonic()
        self._expires = float("inf") if timeout_seconds is None else now + timeout_seconds
        self._kill_from = float("inf")
        self._give_up = float("inf")

    def until_over(self, lifeline: int, wakeup: int) -> ProgramEnd:
        """Return when nothing is left of the program, having ended it if need be."""
        poll = select.poll()
        poll.register(lifeline, select.POLLIN)
        poll.register(wakeup, select.POLLIN)
        survivors: tuple[int, ...] = ()
        while self._reap():
            now = time.monotonic()
            if now >= self._expires and self._cause is None:
                self._end("timeout", now)
            if now >= self._kill_from:
                self._signal(signal.SIGKILL)
            if now >= self._give_up:
                survivors = tuple(descendants(os.getpid()))
                break
            for file, _ in poll.poll(self._pause(now)):
                if file == lifeline:
                    if not os.read(
                        lifeline, 1
                    ):  # the worker is gone, and this end says so for ever
                        poll.unregister(lifeline)
                    stop = True
                else:
                    stop = any(number in _SIGNALS for number in os.read(wakeup, _CHUNK))
                if stop:
                    self._end("stopped", time.monotonic())
        return ProgramEnd(
            exit_code=self._exit_code,
            cause=self._cause,
            peak_memory=_peak_memory(),
            survivors=survivors,
        )

    def _reap(self) -> bool:
        """Take in whatever has ended; return whether anything is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._program:
                self._exit_code = os.waitstatus_to_exitcode(status)
                if self._cause is None:  # nothing outlives a program that has ended by itself
                    self._kill(time.monotonic())

    def _end(self, cause: Literal["timeout", "stopped"], now: float) -> None:
        """Ask all of it to end; whatever has not after two seconds is killed."""
        if self._cause is None and self._exit_code is None:
            self._cause = cause
            self._signal(signal.SIGTERM)
            self._kill(now + GRACE_SECONDS)

    def _kill(self, from_: float) -> None:
        self._kill_from = from_
        self._give_up = from_ + _GIVE_UP_SECONDS

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self._exit_code is None:
                os.killpg(self._program, number)
        group = self._program
        for pid in descendants(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                if number == signal.SIGKILL or os.getpgid(pid) != group:
                    os.kill(pid, number)

    def _pause(self, now: float) -> float | None:
        """Return for how many milliseconds there is nothing to do unless something happens."""
        if now >= self._kill_from:
            return _POLL_SECONDS * 1000
        until = min(self._expires if self._cause is None else float("inf"), self._kill_from)
        return None if until == float("inf") else max(0.0, until - now) * 1000


def _peak_memory() -> int:
    """Return the most bytes that one child had in memory, or 0 if that is not known."""
    peak, own = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)
    )
    # Until it executes its own program, a child has the guardian's memory, and that is counted.
    if peak <= own:
        return 0
    return peak * (1 if sys.platform == "darwin" else _KIB)


def describe_exit(code: int) -> str:
    """Return an exit code in words: the signal's name, where a signal it was."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name: Any = signal.Signals(-code).name
    except ValueError:
        name = -code
    return f"signal {name}"
