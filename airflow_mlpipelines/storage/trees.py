"""Digests of files and directory trees.

What a tree's digest depends on, and what not:

- file names as raw bytes, in any encoding; NFC and NFD spellings are different names;
- file contents: the plain BLAKE3 of the bytes, as ``b3sum`` prints it;
- empty directories count: programs look for them;
- a symbolic link counts as its text if it leads to a place inside the tree; one that leads out of it
  is an error, since what is behind it could change without the tree changing;
- permissions, owners and times do not count: they do not survive object stores, and no result should
  depend on them;
- devices, sockets and pipes are an error;
- a file that changes while it is read is read once more, and then is an error.
"""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from airflow_mlpipelines._digest import DIGEST_PREFIX
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_mlpipelines.storage.stat_cache import StatCache

_LARGE = 8 * 1024 * 1024
"""From this size on a file is read through a memory map by several threads."""
_DIRECTORY, _FILE, _LINK = b"d", b"f", b"l"


@dataclass(frozen=True)
class TreeDigest:
    """What identifies a file's or a directory's content.

    Attributes:
        digest: ``blake3:`` and 64 hex digits.
        size: Bytes of all files.
        files: Number of files, symbolic links included.
    """

    digest: str
    size: int
    files: int
    kind: Literal["dir", "file"]


@dataclass(frozen=True)
class TreeEntry:
    """One member of a tree: its path from the root in raw bytes, its kind and its stat."""

    path: bytes
    kind: bytes
    stat: os.stat_result


def digest_tree(
    path: Path, *, cache: StatCache | None = None, workers: int | None = None
) -> TreeDigest:
    """Return the digest of a file or of a directory with all that is in it.

    Args:
        path: The file or directory. It may itself be a symbolic link, which is followed.
        cache: Digests of files that were read before and have not changed since.
        workers: Threads that read; by default as many as there are processors, at most 8.

    Raises:
        DataError: Nothing is there, or a member can't be digested; the message names it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
    if stat.S_ISREG(status.st_mode):
        known = cache.get_many([(os.fsencode(path), status)])[0] if cache is not None else None
        digest = known or digest_file(os.fsencode(path))
        if cache is not None and known is None:
            cache.put_many([(os.fsencode(path), status, digest)])
        return TreeDigest(f"{DIGEST_PREFIX}{digest.hex()}", status.st_size, 1, "file")
    if not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} is neither a file nor a directory")
    return _digest_directory(os.fsencode(path), cache, workers)


def _digest_directory(root: bytes, cache: StatCache | None, workers: int | None) -> TreeDigest:
    from blake3 import blake3

    entries = sorted(walk_tree(root), key=lambda entry: entry.path)
    files = [entry for entry in entries if entry.kind == _FILE]
    digests = dict(
        zip(
            (entry.path for entry in files), _digest_files(root, files, cache, workers), strict=True
        )
    )
    hasher = blake3(b"tree-v1\0")
    for entry in entries:
        if entry.kind == _FILE:
            content = digests[entry.path]
        elif entry.kind == _LINK:
            content = os.fsencode(os.readlink(os.path.join(root, entry.path)))
        else:
            content = b""
        hasher.update(entry.kind + len(entry.path).to_bytes(8, "big") + entry.path)
        hasher.update(len(content).to_bytes(8, "big") + content)
    return TreeDigest(
        digest=f"{DIGEST_PREFIX}{hasher.hexdigest()}",
        size=sum(entry.stat.st_size for entry in files),
        files=sum(entry.kind != _DIRECTORY for entry in entries),
        kind="dir",
    )


def walk_tree(root: bytes) -> Iterator[TreeEntry]:
    """Yield every member of the tree below ``root``, in no particular order.

    Raises:
        DataError: A directory can't be listed, a link leads out of the tree, or a member is neither
            file, directory nor link.
    """
    real_root = os.path.realpath(root)
    pending = [b""]
    while pending:
        relative = pending.pop()
        directory = os.path.join(root, relative)
        try:
            with os.scandir(directory) as members:
                for member in members:
                    entry = _inspect(member, relative, real_root)
                    if entry.kind == _DIRECTORY:
                        pending.append(entry.path)
                    yield entry
        except OSError as error:
            raise DataError(f"{_show(directory)} can't be listed: {error.strerror}") from error


def _inspect(member: os.DirEntry[bytes], parent: bytes, real_root: bytes) -> TreeEntry:
    path = os.path.join(parent, member.name)
    status = member.stat(follow_symlinks=False)
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return TreeEntry(path, _FILE, status)
    if stat.S_ISDIR(mode):
        return TreeEntry(path, _DIRECTORY, status)
    if stat.S_ISLNK(mode):
        _check_link(member.path, real_root)
        return TreeEntry(path, _LINK, status)
    raise DataError(f"{_show(member.path)} is a device, socket or pipe and can't be digested")


def _check_link(link: bytes, real_root: bytes) -> None:
    target = os.path.realpath(link)
    if os.path.isabs(os.readlink(link)) or not (
        target == real_root or target.startswith(real_root + b"/")
    ):
        raise DataError(
            f"{_show(link)} is a symbolic link that leads out of its directory: what is behind it can "
            "change unnoticed. Copy the data in, or make the link relative and inside."
        )


def _digest_files(
    root: bytes, files: list[TreeEntry], cache: StatCache | None, workers: int | None
) -> list[bytes]:
    paths = [os.path.join(root, entry.path) for entry in files]
    stats = [entry.stat for entry in files]
    known: list[bytes | None] = [None] * len(files)
    if cache is not None:
        known = cache.get_many(list(zip(paths, stats, strict=True)))
    unread = [number for number, digest in enumerate(known) if digest is None]
    if unread:
        threads = workers or min(8, os.cpu_count() or 1)
        todo = [paths[number] for number in unread]
        if threads == 1 or len(todo) == 1:
            read = [digest_file(path) for path in todo]
        else:
            with ThreadPoolExecutor(threads) as pool:
                read = list(pool.map(digest_file, todo, chunksize=64))
        for number, digest in zip(unread, read, strict=True):
            known[number] = digest
        if cache is not None:
            cache.put_many(
                [
                    (paths[number], stats[number], digest)
                    for number, digest in zip(unread, read, strict=True)
                ]
            )
    return [digest for digest in known if digest is not None]


def digest_file(path: bytes) -> bytes:
    """Return the 32 bytes of the BLAKE3 digest of a file that holds still.

    Raises:
        DataError: It can't be read, or it changes while it is read, twice.
    """
    for _ in range(2):
        try:
            before = os.stat(path)
            digest = _read(path, before.st_size)
            after = os.stat(path)
        except OSError as error:
            raise DataError(f"{_show(path)} can't be read: {error.strerror}") from error
        if _version(before) == _version(after):
            return digest
    raise DataError(f"{_show(path)} changes while it is read. Whoever writes it has to end first.")


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: bytes, size: int) -> bytes:
    from blake3 import blake3

    if size >= _LARGE:
        return blake3(max_threads=blake3.AUTO).update_mmap(os.fsdecode(path)).digest()
    with open(path, "rb", buffering=0) as file:
        return blake3(file.read()).digest()


def _show(path: bytes) -> str:
    return repr(os.fsdecode(path))
