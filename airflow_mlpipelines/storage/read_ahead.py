"""A stream that one thread reads while another one still writes what came before."""

from __future__ import annotations

import threading
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor
    from contextlib import AbstractContextManager

_WAITING = 1
"""Chunks that wait, besides the one that is read and the one that is worked on."""
_LOOK_SECONDS = 0.5


class ReadAhead:
    """The chunks of a file. As a context it ends with its reading.

    Args:
        open_file: Opens the file, in the thread that reads it: some connections are of one thread alone.
        chunk_size: In bytes.
        check: Is asked while nothing comes; raises what ends it.
    """

    def __init__(
        self,
        open_file: Callable[[], AbstractContextManager[IO[bytes]]],
        chunk_size: int,
        check: Callable[[], None],
    ) -> None:
        self._open_file = open_file
        self._chunk_size = chunk_size
        self._check = check
        self._chunks: Queue[bytes | BaseException] = Queue(_WAITING)
        self._ended = threading.Event()

    def start(self, threads: Executor) -> ReadAhead:
        """Begin to read, in one of these threads."""
        self._reading = threads.submit(self._read)
        return self

    def __enter__(self) -> ReadAhead:
        """Be iterated over."""
        return self

    def __exit__(self, *_: object) -> None:
        """Read nothing more."""
        self._ended.set()
        self._reading.cancel()

    def __iter__(self) -> Iterator[bytes]:
        """Give the chunks in their order; what reading them raises is raised here."""
        while True:
            try:
                item = self._chunks.get(timeout=_LOOK_SECONDS)
            except Empty:
                self._check()
                continue
            if isinstance(item, BaseException):
                raise item
            if not item:
                return
            yield item

    def _read(self) -> None:
        try:
            with self._open_file() as file:
                while not self._ended.is_set() and (chunk := file.read(self._chunk_size)):
                    self._put(chunk)
            self._put(b"")
        except BaseException as error:  # noqa: BLE001 - it is raised where the chunks are taken
            self._put(error)

    def _put(self, item: bytes | BaseException) -> None:
        while not self._ended.is_set():
            with suppress(Full):
                self._chunks.put(item, timeout=_LOOK_SECONDS)
                return
