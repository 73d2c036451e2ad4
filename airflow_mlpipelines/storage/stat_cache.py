"""Digests of files already read, so that an unchanged file is not read again.

A file counts as unchanged if device, inode, size, modification time *and change time* are those it had
when it was read. The change time can't be set by a program, so a file whose bytes were replaced under
the same size and modification time is noticed. A file that was written so recently that it may be
written again within the same tick of the clock is never remembered (the "racily clean" rule of git).
"""

from __future__ import annotations

import os
import sqlite3
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FRESH_NANOSECONDS = 2_000_000_000
"""Younger changes than this are not trusted: file systems tick as slowly as every two seconds."""
_ROW = struct.Struct("<QQQqq32s")
Row = tuple[int, int, int, int, int, bytes]
"""Device, inode, size, modification time, change time, digest."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS directories (path BLOB PRIMARY KEY, used INTEGER NOT NULL, files BLOB NOT NULL)
"""


class StatCache:
    """Digests of files by what the file system says of them; one packed row per directory.

    Many processes may share it. If its file is damaged or can't be written, nothing is remembered, and
    nothing fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def get_many(self, files: Sequence[tuple[bytes, os.stat_result]]) -> list[bytes | None]:
        """Return each file's digest (32 bytes), or None where it has to be read."""
        wanted = _by_directory(files)
        known = self._load(list(wanted))
        found: list[bytes | None] = [None] * len(files)
        for directory, members in wanted.items():
            remembered = known.get(directory)
            if remembered is None:
                continue
            for number, name in members:
                status = files[number][1]
                row = remembered.get(name)
                if row is not None and row[:5] == _key(status):
                    found[number] = row[5]
        return found

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
        wanted = _by_directory([(path, status) for path, status, _ in steady])
        connection = self._connect()
        if connection is None:
            return
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                known = self._load(list(wanted))
                for directory, members in wanted.items():
                    rows = known.get(directory, {})
                    for number, name in members:
                        _, status, digest = steady[number]
                        rows[name] = (*_key(status), digest)
                    connection.execute(
                        "INSERT OR REPLACE INTO directories VALUES (?, ?, ?)",
                        (directory, now, _pack(rows)),
                    )
        except sqlite3.Error:
            self._give_up()

    def _load(self, directories: list[bytes]) -> dict[bytes, dict[bytes, Row]]:
        connection = self._connect()
        if connection is None:
            return {}
        known = {}
        try:
            for directory in directories:
                row = connection.execute(
                    "SELECT files FROM directories WHERE path = ?", (directory,)
                ).fetchone()
                if row is not None:
                    known[directory] = _unpack(row[0])
        except (sqlite3.Error, struct.error):
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


def _by_directory(
    files: Sequence[tuple[bytes, os.stat_result]],
) -> dict[bytes, list[tuple[int, bytes]]]:
    wanted: dict[bytes, list[tuple[int, bytes]]] = {}
    for number, (path, _) in enumerate(files):
        directory, name = os.path.split(path)
        wanted.setdefault(directory, []).append((number, name))
    return wanted


def _key(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _pack(rows: dict[bytes, Row]) -> bytes:
    parts: list[bytes] = []
    for name, row in rows.items():
        parts += [len(name).to_bytes(2, "little"), name, _ROW.pack(*row)]
    return b"".join(parts)


def _unpack(data: bytes) -> dict[bytes, Row]:
    rows: dict[bytes, Row] = {}
    position, end = 0, len(data)
    while position < end:
        length = int.from_bytes(data[position : position + 2], "little")
        position += 2
        name = data[position : position + length]
        position += length
        device, inode, size, modified, changed, digest = _ROW.unpack_from(data, position)
        rows[name] = (device, inode, size, modified, changed, digest)
        position += _ROW.size
    return rows
