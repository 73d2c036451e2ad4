"""Files cut into parts, which several threads carry in the order of the files, and which are digested in passing.

At any moment as many parts are in memory as there are threads, however large the files are.
"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from airflow_mlpipelines.storage.listing import RemoteFile

PART = 8 << 20
THREADS = 8
_MOST_PARTS = 9000
"""S3 takes 10,000."""
_WAIT_SECONDS = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a file.

    Attributes:
        number: Counts the file's parts, from 0.
        start: The place of its first byte in the file.
    """

    number: int
    start: int
    size: int


def cut(size: int, part_size: int = PART) -> list[Part]:
    """Return the parts of a file of ``size`` bytes; one that holds nothing for an empty file."""
    starts = range(0, size, part_size) or range(1)
    return [
        Part(number, start, min(part_size, size - start)) for number, start in enumerate(starts)
    ]


class StoppedError(DataError):
    """Another part has failed."""


class OrderedDigest:
    """The digest of one file whose parts come in any order from several threads."""

    def __init__(self, stop: threading.Event) -> None:
        from blake3 import blake3

        self._hasher = blake3()
        self._next = 0
        self._turn = threading.Condition()
        self._stop = stop

    def add(self, number: int, data: bytes | memoryview) -> int:
        """Take in a part, once those before it have been; return how many have been then.

        Whoever carries parts in the order in which they were given out waits for others, never for itself.
        """
        with self._turn:
            while self._next != number:
                if self._stop.is_set():
                    raise StoppedError("stopped")
                self._turn.wait(_WAIT_SECONDS)
            self._hasher.update(data)
            self._next += 1
            self._turn.notify_all()
            return self._next

    def digest(self) -> bytes:
        """Return the 32 bytes of the digest of what was taken in."""
        return bytes(self._hasher.digest())


class Memory:
    """Bytes that jobs may have in memory, all together; whoever was given out first gets them first.

    Args:
        size: How many. A job that wants more than all of them is done alone.
        stop: Is set when a job has failed.
    """

    def __init__(self, size: int, stop: threading.Event) -> None:
        self._size = self._free = size
        self._stop = stop
        self._change = threading.Condition()

    def lend(self, size: int, job: Callable[[], None]) -> Callable[[], None]:
        """Return the job, once there are so many bytes for it; they are free again when it is done.

        Called as jobs are given out, by one thread at a time: those that have theirs then wait for none that has not.

        Raises:
            StoppedError: Another job has failed.
        """
        taken = min(size, self._size)
        with self._change:
            while self._free < taken:
                if self._stop.is_set():
                    raise StoppedError("stopped")
                self._change.wait(_WAIT_SECONDS)
            self._free -= taken

        def do() -> None:
            try:
                job()
            finally:
                with self._change:
                    self._free += taken
                    self._change.notify_all()

        return do


def carry_all(
    jobs: Iterable[Callable[[], None]], *, threads: int = THREADS, stop: threading.Event
) -> None:
    """Do all jobs, in the order in which they come, several at a time; the first error ends it.

    Args:
        jobs: Taken one by one, as threads become free.
        threads: How many are done at a time.
        stop: Is set when one has failed.
    """
    source, lock = iter(jobs), threading.Lock()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    job = next(source, None)
                if job is None:
                    return
                job()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            errors = [error for worker in workers if (error := worker.exception()) is not None]
        except BaseException:  # of this thread: a timeout, an interrupt
            stop.set()
            raise
    for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
        raise error


def part_size(size: int) -> int:
    """Return how large the parts of a file of ``size`` bytes are; grown where a store takes no more of them."""
    return max(PART, -(-size // _MOST_PARTS))


def read_part(local: str, part: Part) -> bytes | None:
    """Return a part of a file of this machine that was brought before, or None if it is not here after all."""
    try:
        with open(local, "rb", buffering=0) as file:  # noqa: PTH123 - thousands of them
            data = os.pread(file.fileno(), part.size, part.start)
    except OSError:
        return None
    return data if len(data) == part.size else None


def write_part(local: str, part: Part, data: bytes | memoryview) -> None:
    """Write a part to its place in a file of this machine, which is made if it is not there."""
    handle = os.open(local, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        view, at = memoryview(data), part.start
        while view:
            written = os.pwrite(handle, view, at)
            view, at = view[written:], at + written
    finally:
        os.close(handle)


class PartsJournal:
    """Which parts of which files lie on this machine's disk, noted as they come.

    It is believed only while the machine has not been restarted: what a program has written is on its way to the
    disk for a while after.

    Args:
        path: Where it is kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: set[tuple[str, str, int]] = set()
        self._handle: int | None = None

    def __enter__(self) -> PartsJournal:
        """Read what is there, and be ready for more."""
        lines = list(self._read())
        boot = _boot_id()
        if lines and boot is not None and lines[0] == [boot]:
            self._parts = {(str(a), str(b), int(c)) for a, b, c in lines[1:]}
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._handle = os.open(self._path, flags | (0 if self._parts else os.O_TRUNC), 0o644)
        if not self._parts:
            self._append([boot])
        return self

    def __exit__(self, *_: object) -> None:
        """Write nothing more."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @property
    def holds_parts(self) -> bool:
        """Whether anything was there from the start, or has come."""
        return bool(self._parts)

    def has(self, file: RemoteFile, part: Part) -> bool:
        """Whether a part of this version of the file is here."""
        return (file.path, _show(file), part.start) in self._parts

    def note(self, file: RemoteFile, part: Part) -> None:
        """Note that a part is here."""
        self._append([file.path, _show(file), part.start])

    def _append(self, line: list[Any]) -> None:
        if self._handle is not None:
            os.write(self._handle, json.dumps(line).encode() + b"\n")

    def _read(self) -> Iterator[Any]:
        with suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # the last one, cut short
                    return


def _show(file: RemoteFile) -> str:
    return f"{file.version}:{file.size}"


def _boot_id() -> str | None:
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return None
