"""How the files of a transfer get from one end to the other: as streams, in parts, or copied by the store itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import IO, TYPE_CHECKING

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.part_targets import open_target
from airflow_mlpipelines.storage.parts import (
    PART,
    THREADS,
    OrderedDigest,
    StoppedError,
    cut,
    part_size,
)
from airflow_mlpipelines.storage.read_ahead import ReadAhead
from airflow_mlpipelines.storage.server_copies import copy_file, open_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from airflow_mlpipelines.storage.ends import End
    from airflow_mlpipelines.storage.journal import Journal
    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.part_targets import PartTarget, S3Parts
    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.progress import Progress

LARGE = 8 * PART
"""From this size on a file goes in parts, and is gone on with within after a break."""
_CHUNK = 2 << 20
"""Of a stream: three of them are in memory at a time, besides what the drivers keep."""


class Sender:
    """Sends files from one end to the other. As a context it ends with its threads and open files.

    Args:
        source: Where they are.
        target: Where they go.
        journal: Knows the large files that earlier tries have begun.
        progress: Is told what has come.
        stop: Ends the transfer when it is set.
        failed: Is set when anything has failed.
    """

    def __init__(
        self,
        source: End,
        target: End,
        journal: Journal,
        progress: Progress,
        stop: threading.Event,
        failed: threading.Event,
    ) -> None:
        self._source, self._target = source, target
        self._journal, self._progress = journal, progress
        self._stop, self._failed = stop, failed
        # Streams are read by as many threads of their own: a connection may be of one thread alone.
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
        self._open: list[PartTarget] = []

    def __enter__(self) -> Sender:
        """Be ready."""
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        for target in self._open:
            target.close()

    def jobs(
        self, files: Sequence[RemoteFile], digests: dict[str, str], *, on_server: bool
    ) -> Iterator[Callable[[], None]]:
        """Give what has to be done, to be done in this order.

        Args:
            files: What is to be sent.
            digests: Gets the digest of each file that has come, as 64 hex digits; nothing where it was not read.
            on_server: Whether the store copies them.
        """
        for file in files:
            target: PartTarget | None = None
            if on_server:
                copied = open_copy(self._source, self._target, file)
                if copied is not None:
                    yield from self._copied_parts(file, copied, digests)
                else:
                    yield partial(self._copy, file, digests)
                continue
            if file.size >= LARGE and self._source.has_ranges:
                target = open_target(self._target, file, cut(file.size, part_size(file.size)))
            if target is not None:
                yield from self._sent_parts(file, target, digests)
            else:
                yield partial(self._stream, file, digests)

    # ---- in parts --------------------------------------------------------------------------

    def _sent_parts(
        self, file: RemoteFile, target: PartTarget, digests: dict[str, str]
    ) -> Iterator[Callable[[], None]]:
        """Send a large file in parts; those that came in an earlier try are not sent again.

        They are not read again either where their version names their bytes; then the file's digest is known only
        if they can be read back from where they are.
        """
        self._begin(file, target)
        digest, unread = OrderedDigest(self._failed), threading.Event()

        def bring(part: Part) -> None:
            self._check()
            data: bytes | memoryview | None = None
            if file.names_content and target.has(part):
                data = target.read(part)
                if data is None:
                    unread.set()
            else:
                with self._translate(self._source, file, "read"):
                    data = self._read(file, part)
                with self._translate(self._target, file, "written"):
                    target.write(part, data)
            self._progress.add(size=part.size)
            if digest.add(part.number, data or b"") == len(target.parts):
                with self._translate(self._target, file, "written"):
                    target.finish()
                digests[file.path] = "" if unread.is_set() else digest.digest().hex()
                self._progress.add(files=1)

        for part in target.parts:
            yield partial(bring, part)

    def _copied_parts(
        self, file: RemoteFile, target: S3Parts, digests: dict[str, str]
    ) -> Iterator[Callable[[], None]]:
        """Have a large object copied in parts; those of an earlier try are there."""
        self._begin(file, target)
        left, lock = len(target.parts), threading.Lock()

        def bring(part: Part) -> None:
            nonlocal left
            self._check()
            with self._translate(self._target, file, "written"):
                if not (file.names_content and target.has(part)):
                    target.copy(part)
                self._progress.add(size=part.size)
                with lock:
                    left -= 1
                    is_last = not left
                if is_last:
                    target.finish()
                    digests[file.path] = ""
                    self._progress.add(files=1)

        for part in target.parts:
            yield partial(bring, part)

    def _begin(self, file: RemoteFile, target: PartTarget) -> None:
        with self._translate(self._target, file, "written"):
            token, stale = self._journal.find_begun(file, target.parts[0].size)
            if stale is not None:
                target.abandon(stale)
            self._open.append(target)
            self._journal.note_begun(file, target.parts[0].size, target.begin(token))

    def _read(self, file: RemoteFile, part: Part) -> bytes | memoryview:
        return self._source.read_part(file, part, self._failed)

    # ---- as a stream -----------------------------------------------------------------------

    def _stream(self, file: RemoteFile, digests: dict[str, str]) -> None:
        """Send a file from its beginning to its end, read by another thread while it is written."""
        from blake3 import blake3

        self._check()
        hasher, size = blake3(), 0
        with (
            self._translate(self._target, file, "written"),
            self._target.write(file.path, file.size) as writer,
            ReadAhead(partial(self._opened, file), _CHUNK, self._check).start(
                self._readers
            ) as chunks,
        ):
            for chunk in chunks:
                self._check()
                hasher.update(chunk)
                writer.write(chunk)
                size += len(chunk)
                self._progress.add(size=len(chunk))
            if size != file.size:
                raise DataError(
                    f"{self._source.store.uri(self._source.below(file.path))} had {file.size} bytes, and "
                    f"{size} when it was read: somebody writes it."
                )
        digests[file.path] = hasher.hexdigest()
        self._progress.add(files=1)

    @contextmanager
    def _opened(self, file: RemoteFile) -> Iterator[IO[bytes]]:
        with self._translate(self._source, file, "read"), self._source.read(file.path) as reader:
            yield reader

    # ---- by the store ----------------------------------------------------------------------

    def _copy(self, file: RemoteFile, digests: dict[str, str]) -> None:
        """Have an object copied in one."""
        told = 0

        def tell(size: int) -> None:
            nonlocal told
            self._progress.add(size=size - told)
            told = size

        self._check()
        with self._translate(self._target, file, "written"):
            copy_file(self._source, self._target, file.path, tell, self._check)
        tell(file.size)
        digests[file.path] = ""
        self._progress.add(files=1)

    def _check(self) -> None:
        if self._stop.is_set() or self._failed.is_set():
            raise StoppedError("The transfer was stopped.")

    @staticmethod
    def _translate(end: End, file: RemoteFile, what: str) -> AbstractContextManager[None]:
        return end.store.translate_errors(end.below(file.path), what)
