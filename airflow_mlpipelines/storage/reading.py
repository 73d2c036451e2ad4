"""The bytes of a remote store's files: read in parts, several at a time; digested, without being kept."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from airflow_mlpipelines._units import show_size
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.parts import (
    PART,
    OrderedDigest,
    Part,
    StoppedError,
    carry_all,
    cut,
)
from airflow_mlpipelines.storage.ranges import read_range
from airflow_mlpipelines.storage.s3_objects import find_objects
from airflow_mlpipelines.storage.trees import combine_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.stores import Store

_REPORT_SECONDS = 15.0
_REQUESTS = 64
"""Of 32 KiB each."""


class ReadingProgress:
    """Says from time to time how much of something has been read; many threads count.

    Args:
        what: Its name for people.
        size: Its bytes.
        emit: Takes lines for the log; None for nobody.
    """

    def __init__(self, what: str, size: int, emit: Callable[[str], None] | None) -> None:
        self._what, self._size, self._emit = what, size, emit
        self._passed = 0
        self._lock = threading.Lock()
        self._started = self._reported = time.monotonic()

    def add(self, size: int) -> None:
        """Count bytes that have been read."""
        with self._lock:
            self._passed += size
            now = time.monotonic()
            if self._emit is None or now - self._reported < _REPORT_SECONDS:
                return
            self._reported = now
            rate = self._passed / max(now - self._started, 1e-3)
            line = f"{show_size(self._passed)} of {show_size(self._size)}, {show_size(rate)}/s"
        self._emit(f"Reading {self._what}: {line}")


def stream_file(
    store: Store, path: str, file: RemoteFile, *, stop: threading.Event
) -> Iterator[bytes]:
    """Yield a file from its begin to its end.

    Args:
        store: The datastore.
        path: Where the file is on it.
        file: As it was listed.
        stop: Says, when it is set, that nothing is wanted any more.

    Raises:
        DataError: It has another size than when it was listed.
    """
    block = PART if store.protocol.ranges else 0
    passed = 0
    with store.filesystem.open(store.remote_path(path), "rb", block_size=block) as opened:
        if hasattr(opened, "prefetch"):  # SFTP would wait for each answer before the next request
            opened.prefetch(file.size, _REQUESTS)
        while data := opened.read(PART):
            if stop.is_set():
                raise StoppedError("stopped")
            passed += len(data)
            yield data
    if passed != file.size:
        raise DataError(
            f"{store.uri(path)} had {file.size} bytes when it was listed, and has others now. Start a new run, "
            "which takes it as it is."
        )


def digest_remote(
    store: Store,
    path: str,
    files: Sequence[RemoteFile],
    *,
    emit: Callable[[str], None] | None = None,
) -> str:
    """Return the digest of what is at a path of a remote store, read once and written nowhere.

    Args:
        store: The datastore.
        path: A file or directory on it.
        files: What is there.
        emit: Takes lines for the log, which say how far it is.

    Raises:
        DataError: It can't be read, or was changed meanwhile.
    """
    from blake3 import blake3

    find_objects(store)  # once, before many threads want them
    # Where a file is one stream, as with SFTP, parts of it would each be opened anew.
    in_parts = store.protocol.whole_objects and store.protocol.ranges
    progress = ReadingProgress(store.uri(path), sum(file.size for file in files), emit)
    stop = threading.Event()
    digests: dict[str, bytes] = {}

    def take_part(
        place: str, file: RemoteFile, part: Part, digest: OrderedDigest, last: bool
    ) -> None:
        digest.add(part.number, read_range(store, place, file, part, stop=stop))
        if last:
            digests[file.path] = digest.digest()
        progress.add(part.size)

    def take_stream(place: str, file: RemoteFile) -> None:
        hasher = blake3()
        for data in stream_file(store, place, file, stop=stop):
            hasher.update(data)
            progress.add(len(data))
        digests[file.path] = hasher.digest()

    def jobs() -> Iterator[Callable[[], None]]:
        for file in files:
            place = "/".join(part for part in (path, file.path) if part)
            if not in_parts:
                yield partial(take_stream, place, file)
                continue
            parts, digest = cut(file.size), OrderedDigest(stop)
            for part in parts:
                yield partial(take_part, place, file, part, digest, part is parts[-1])

    with store.translate_errors(path, "read"):
        carry_all(jobs(), stop=stop)
    return combine_files(digests)
