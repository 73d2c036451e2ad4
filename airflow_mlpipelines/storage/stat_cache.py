"""Digests of files already read, so that an unchanged file is not read again.

A file counts as unchanged if device, inode, size, modification time *and change time* are those it had
when it was read. The change time can't be set by a program, so a file whose bytes were replaced under
the same size and modification time is noticed. A file that was written so recently that it may be
written again within the same tick of the clock is never remembered (the "racily clean" rule of git).
"""

from __future__ import annotations

import sqlite3
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_FRESH_NANOSECONDS = 2_000_000_000
"""Younger changes than this are not trusted: file systems tick as slowly as every two seconds."""
_ROW = struct.Struct("<QQQqq32s")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS listings (path BLOB PRIMARY KEY, used INTEGER NOT NULL, files BLOB NOT NULL)
"""


class KnownFile(NamedTuple):
    """A file that was read: what the file system said of it then, and the 32 bytes of its digest."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    digest: bytes

    def is_of(self, status: os.stat_result) -> bool:
        """Return whether a file of which the file system says this is unchanged since."""
        return self[:5] == _key(status)


class StatCache:
    """Digests of files by what the file system says of them; one packed row per directory.

    Many processes may share it. If its file is damaged or can't be written, nothing is remembered, and
    nothing fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def get(self, file: bytes, status: os.stat_result) -> bytes | None:
        """Return a file's digest (32 bytes), or None if it has to be read."""
        directory, name = _split(file)
        known = self.get_directory(directory).get(name)
        return known.digest if known is not None and known.is_of(status) else None

    def get_directory(self, directory: bytes) -> Mapping[bytes, KnownFile]:
        """Return what was known of the files right in a directory (whose path ends with ``/``), by name."""
        return self._load([directory]).get(directory, {})

    def put_many(self, files: Sequence[tuple[bytes, os.stat_result, bytes]]) -> None:
        """Remember the digest of each file as it was when ``stat`` was asked, before reading."""
        now = time.time_ns()
        steady = [
            (path, status, digest)
            for path, status, digest in files
            if now - max(status.st_mtime_ns, status.st_ctime_ns) > _FRESH_NANOSECONDS
        ]
        if not steady:
            return
        changed: dict[bytes, dict[bytes, KnownFile]] = {}
        for path, status, digest in steady:
            directory, name = _split(path)
            changed.setdefault(directory, {})[name] = KnownFile(*_key(status), digest)
        connection = self._connect()
        if connection is None:
            return
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                known = self._load(list(changed))
                for directory, files_in_it in changed.items():
                    connection.execute(
                        "INSERT OR REPLACE INTO listings VALUES (?, ?, ?)",
                        (directory, now, _pack({**known.get(directory, {}), **files_in_it})),
                    )
        except sqlite3.Error:
            self._give_up()

    def _load(self, directories: list[bytes]) -> dict[bytes, dict[bytes, KnownFile]]:
        connection = self._connect()
        if connection is None:
            return {}
        known = {}
        try:
            for directory in directories:
                row = connection.execute(
                    "SELECT files FROM listings WHERE path = ?", (directory,)
                ).fetchone()
                if row is not None:
                    known[directory] = _unpack(row[0])
        except (sqlite3.Error, struct.error, ValueError):
            self._give_up()
            return {}
        return known

    def _connect(self) -> sqlite3.Connection | None:
        if self._connection is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(
                    self._path, timeout=10, isolation_level=None, check_same_thread=False
                )
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=OFF")  # losing it costs only reading again
                connection.execute(_SCHEMA)
            except (sqlite3.Error, OSError):
                return None
            self._connection = connection
        return self._connection

    def _give_up(self) -> None:
        """Forget a damaged file: it is made anew the next time."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._path.unlink(missing_ok=True)


def _split(path: bytes) -> tuple[bytes, bytes]:
    """Return a file's directory, with the ``/`` at its end, and its name."""
    cut = path.rfind(b"/") + 1
    return path[:cut], path[cut:]


def _key(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _pack(files: Mapping[bytes, KnownFile]) -> bytes:
    """Return the names, parted by the one character that no name holds, a zero byte, and the rows."""
    return b"/".join(files) + b"\0" + b"".join(_ROW.pack(*file) for file in files.values())


def _unpack(data: bytes) -> dict[bytes, KnownFile]:
    names, _, rows = data.partition(b"\0")
    files = map(KnownFile._make, _ROW.iter_unpack(rows))
    return dict(zip(names.split(b"/"), files, strict=True))
