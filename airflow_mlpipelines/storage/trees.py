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
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from airflow_mlpipelines._digest import DIGEST_PREFIX
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from airflow_mlpipelines.storage.stat_cache import StatCache

_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_LARGE = 8 * 1024 * 1024
"""From this size on a file is read through a memory map by several threads."""
_DIRECTORY, _FILE, _LINK = b"d", b"f", b"l"
_KINDS = {stat.S_IFDIR: _DIRECTORY, stat.S_IFREG: _FILE, stat.S_IFLNK: _LINK}
_LENGTH = struct.Struct(">Q").pack


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


class TreeEntry(NamedTuple):
    """One member of a tree: its path from the root in raw bytes, its kind and its stat."""

    path: bytes
    kind: bytes
    stat: os.stat_result


def digest_tree(
    path: Path, *, cache: StatCache | None = None, workers: int | None = None, seal: bool = False
) -> TreeDigest:
    """Return the digest of a file or of a directory with all that is in it.

    Args:
        path: The file or directory. It may itself be a symbolic link, which is followed.
        cache: Digests of files that were read before and have not changed since.
        workers: Threads that read; by default as many as there are processors, at most 8.
        seal: Whether to take the right to write away from all files, before they are read. Those of another user,
            and those that have another name elsewhere, are left as they are.

    Raises:
        DataError: Nothing is there, or a member can't be digested; the message names it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
    if stat.S_ISREG(status.st_mode):
        file = os.fsencode(path)
        status = _seal(file, status) if seal else status
        known = cache.get(file, status) if cache is not None else None
        digest = known or digest_file(file)
        if cache is not None and known is None:
            cache.put_many([(file, status, digest)])
        return TreeDigest(f"{DIGEST_PREFIX}{digest.hex()}", status.st_size, 1, "file")
    if not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} is neither a file nor a directory")
    return _digest_directory(os.fsencode(path), cache, workers, seal=seal)


def _seal(file: bytes, status: os.stat_result) -> os.stat_result:
    """Take the right to write away from a file, and return its stat."""
    if not status.st_mode & _WRITE or status.st_nlink > 1:
        return status
    try:
        os.chmod(file, stat.S_IMODE(status.st_mode) & ~_WRITE)
    except OSError:  # of another user, or on a file system without rights
        return status
    return os.stat(file)


def _digest_directory(
    root: bytes, cache: StatCache | None, workers: int | None, *, seal: bool
) -> TreeDigest:
    top = os.path.join(root, b"")
    found: list[tuple[bytes, bytes, bytes]] = []  # path, kind, content: what the digest is made of
    unread: list[tuple[bytes, os.stat_result]] = []
    size = files = 0
    for prefix, members in _list_directories(root):
        known = cache.get_directory(top + prefix) if cache is not None else {}
        for path, kind, found_status in members:
            status = found_status
            if kind == _FILE:
                if seal:
                    status = _seal(top + path, status)
                files += 1
                size += status.st_size
                row = known.get(path[len(prefix) :])
                if row is not None and row.is_of(status):
                    found.append((path, kind, row.digest))
                else:
                    unread.append((path, status))
            elif kind == _LINK:
                files += 1
                found.append((path, kind, os.fsencode(os.readlink(top + path))))
            else:
                found.append((path, kind, b""))
    if unread:
        digests = _digest_files([top + path for path, _ in unread], workers)
        found += [(path, _FILE, digest) for (path, _), digest in zip(unread, digests, strict=True)]
        if cache is not None:
            cache.put_many(
                [
                    (top + path, status, digest)
                    for (path, status), digest in zip(unread, digests, strict=True)
                ]
            )
    return TreeDigest(combine_members(found), size, files, "dir")


def combine_members(members: Iterable[tuple[bytes, bytes, bytes]]) -> str:
    """Return the digest of a directory from what is known of all its members, in any order.

    Args:
        members: Each one's path in raw bytes; its kind, ``f``, ``d`` or ``l``; and its content: the 32
            bytes of a file's digest, the text of a link, nothing for a directory.
    """
    from blake3 import blake3

    parts = [b"tree-v1\0"]
    for path, kind, content in sorted(members):
        parts += (kind, _LENGTH(len(path)), path, _LENGTH(len(content)), content)
    return f"{DIGEST_PREFIX}{blake3(b''.join(parts)).hexdigest()}"


def combine_files(
    digests: Mapping[str, bytes], others: Iterable[tuple[bytes, bytes, bytes]] = ()
) -> str:
    """Return the digest of a directory from those of its files; directories are what their names imply.

    Args:
        digests: The 32 bytes of each file's digest, by its path; that of a file that is no directory by ``""``.
        others: What else there is, as :func:`combine_members` takes it.
    """
    if "" in digests:
        return f"{DIGEST_PREFIX}{digests[''].hex()}"
    members, parents = list(others), {b""}
    for name, content in digests.items():
        path = os.fsencode(name)
        members.append((path, _FILE, content))
        while (path := os.path.dirname(path)) not in parents:
            parents.add(path)
            members.append((path, _DIRECTORY, b""))
    return combine_members(set(members))


def walk_tree(root: bytes) -> Iterator[TreeEntry]:
    """Yield every member of the tree below ``root``, in no particular order.

    Raises:
        DataError: A directory can't be listed, a link leads out of the tree, or a member is neither
            file, directory nor link.
    """
    for _, members in _list_directories(root):
        yield from members


def _list_directories(root: bytes) -> Iterator[tuple[bytes, list[TreeEntry]]]:
    """Yield every directory of the tree, as what comes before its members' names, and its members."""
    real_root = os.path.realpath(root)
    pending = [b""]
    while pending:
        prefix = pending.pop()
        directory = os.path.join(root, prefix)
        try:
            with os.scandir(directory) as scan:
                members = [_inspect(member, prefix, real_root) for member in scan]
        except OSError as error:
            raise DataError(f"{_show(directory)} can't be listed: {error.strerror}") from error
        pending += [member.path + b"/" for member in members if member.kind == _DIRECTORY]
        yield prefix, members


def _inspect(member: os.DirEntry[bytes], prefix: bytes, real_root: bytes) -> TreeEntry:
    status = member.stat(follow_symlinks=False)
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        raise DataError(f"{_show(member.path)} is a device, socket or pipe and can't be digested")
    if kind == _LINK:
        _check_link(member.path, real_root)
    return TreeEntry(prefix + member.name, kind, status)


def _check_link(link: bytes, real_root: bytes) -> None:
    target = os.path.realpath(link)
    if os.path.isabs(os.readlink(link)) or not (
        target == real_root or target.startswith(real_root + b"/")
    ):
        raise DataError(
            f"{_show(link)} is a symbolic link that leads out of its directory: what is behind it can "
            "change unnoticed. Copy the data in, or make the link relative and inside."
        )


def _digest_files(paths: list[bytes], workers: int | None) -> list[bytes]:
    threads = workers or min(8, os.cpu_count() or 1)
    if threads == 1 or len(paths) == 1:
        return [digest_file(path) for path in paths]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(digest_file, paths, chunksize=64))


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
