"""Files of a remote store brought to this machine's disk: in parts, several at a time, and digested in passing.

What a lost or failed process has brought is noted in a journal beside the data, and is not brought again.
"""

from __future__ import annotations

import os
import shutil
import threading
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from airflow_mlpipelines.storage.parts import (
    OrderedDigest,
    Part,
    PartsJournal,
    carry_all,
    cut,
    read_part,
    write_part,
)
from airflow_mlpipelines.storage.ranges import read_range
from airflow_mlpipelines.storage.s3_objects import find_objects
from airflow_mlpipelines.storage.trees import combine_files, digest_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.reading import ReadingProgress
    from airflow_mlpipelines.storage.stores import Store

JOURNAL_SUFFIX = ".parts"
"""Ends the name of the journal of what is brought to a path, beside that path."""


def download(
    store: Store,
    path: str,
    files: Sequence[RemoteFile],
    kind: Literal["dir", "file"],
    target: Path,
    *,
    progress: ReadingProgress | None = None,
) -> str:
    """Return the digest of what was brought to ``target``, once all of it has come.

    After an error, or if this process is lost, the next call goes on with the parts that have come whole.

    Args:
        store: The datastore.
        path: A file or directory on it.
        files: What is there.
        kind: Which of both it is.
        target: Where it goes.
        progress: Is told of what has come.

    Raises:
        DataError: It can't be read, or was changed meanwhile.
    """
    with (
        store.translate_errors(path, "fetched"),
        PartsJournal(target.with_name(f"{target.name}{JOURNAL_SUFFIX}")) as journal,
    ):
        return _Download(store, path, kind, target, journal, progress).run(files)


class _Download:
    def __init__(
        self,
        store: Store,
        path: str,
        kind: Literal["dir", "file"],
        target: Path,
        journal: PartsJournal,
        progress: ReadingProgress | None,
    ) -> None:
        self._store = store
        self._path = path
        self._kind = kind
        self._target = target
        self._journal = journal
        self._progress = progress
        find_objects(store)  # once, before many threads want them
        # Where a file is one stream, as with SFTP, parts of it would each be opened anew.
        self._in_parts = store.protocol.whole_objects and store.protocol.ranges
        self._stop = threading.Event()
        self._digests: dict[str, bytes] = {}

    def run(self, files: Sequence[RemoteFile]) -> str:
        _drop_others(self._target, files, self._kind)
        if self._kind == "dir":
            for directory in {os.path.dirname(file.path) for file in files} | {""}:  # noqa: PTH120 - thousands of names
                (self._target / directory).mkdir(parents=True, exist_ok=True)
        carry_all(self._jobs(files), stop=self._stop)
        return combine_files(self._digests)

    def _jobs(self, files: Sequence[RemoteFile]) -> Iterator[Callable[[], None]]:
        for file in files:
            place = "/".join(part for part in (self._path, file.path) if part)
            local = os.path.join(self._target, file.path) if file.path else str(self._target)  # noqa: PTH118
            if self._in_parts:
                yield from self._parts_of(file, place, local)
            else:
                remote = self._store.remote_path(place)
                yield partial(self._bring_whole, file, remote, local)

    def _parts_of(self, file: RemoteFile, place: str, local: str) -> Iterator[Callable[[], None]]:
        parts = cut(file.size)
        here = [self._journal.has(file, part) for part in parts]
        if not any(here) and self._journal.holds_parts:
            Path(local).unlink(missing_ok=True)  # parts of another version
        digest = OrderedDigest(self._stop)
        for part, is_here in zip(parts, here, strict=True):

            def bring(part: Part = part, is_here: bool = is_here) -> None:
                data: bytes | memoryview | None = read_part(local, part) if is_here else None
                if data is None:
                    data = read_range(self._store, place, file, part, stop=self._stop)
                    write_part(local, part, data)
                    self._journal.note(file, part)
                if digest.add(part.number, data) == len(parts):
                    self._digests[file.path] = digest.digest()
                self._count(part.size)

            yield bring

    def _bring_whole(self, file: RemoteFile, remote: str, local: str) -> None:
        whole = Part(0, 0, file.size)
        if not self._journal.has(file, whole):
            self._store.filesystem.get_file(remote, local)
            self._journal.note(file, whole)
        self._digests[file.path] = digest_file(os.fsencode(local))
        self._count(file.size)

    def _count(self, size: int) -> None:
        if self._progress is not None:
            self._progress.add(size)


def _drop_others(target: Path, files: Collection[RemoteFile], kind: Literal["dir", "file"]) -> None:
    """Delete what an earlier attempt has brought of what the store listed then, and doesn't list now."""
    if kind == "file":
        if target.is_dir():
            shutil.rmtree(target)
        return
    if not target.is_dir():
        target.unlink(missing_ok=True)
        return
    listed = {os.path.normpath(file.path) for file in files}
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    for directory, _, names in os.walk(target, topdown=False):
        here = os.path.relpath(directory, target)
        for name in names:
            if os.path.normpath(f"{here}/{name}") not in listed:
                os.unlink(f"{directory}/{name}")  # noqa: PTH108 - thousands of names
        if here not in parents:
            os.rmdir(directory)  # noqa: PTH106
