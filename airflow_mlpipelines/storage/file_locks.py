"""Locks that processes of one machine hold on files, and that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def lock_file(
    path: Path, *, shared: bool, wait: bool = True, create: bool = True
) -> Iterator[bool]:
    """Hold a lock file, and give True; False if others hold it, or it is not there to be held.

    A holder that holds it alone may delete it: whoever waited for it then makes it anew.

    Args:
        path: The file.
        shared: Together with others that hold it so, or alone.
        wait: Whether to wait for others.
        create: Whether to make it where it is not there.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    with _hold(path, how, flags, create=create) as held:
        yield held


@contextmanager
def lock_directory(path: Path, *, create: bool = True) -> Iterator[bool]:
    """Hold a directory alone, and give True; False if others hold it, or it is not there to be held.

    A holder may delete it: whoever comes for it at that moment makes it anew.

    Args:
        path: The directory; that above it is there.
        create: Whether to make it where it is not there.
    """
    how, flags = fcntl.LOCK_EX | fcntl.LOCK_NB, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with _hold(path, how, flags, create=create) as held:
        yield held


@contextmanager
def _hold(path: Path, how: int, flags: int, *, create: bool) -> Iterator[bool]:
    handle = _open_locked(path, how, flags, create=create)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _open_locked(path: Path, how: int, flags: int, *, create: bool) -> int | None:
    makes_directory = create and bool(flags & os.O_DIRECTORY)
    while True:
        if makes_directory:
            path.mkdir(exist_ok=True)
        try:
            handle = os.open(path, flags, 0o644)
        except FileNotFoundError:
            if not create:
                return None
            if makes_directory:  # deleted since it was made
                continue
            raise
        kept = False
        try:
            fcntl.flock(handle, how)
            kept = _is_still(path, handle)
        except BlockingIOError:
            return None
        finally:
            if not kept:
                os.close(handle)
        if kept:
            return handle


def _is_still(path: Path, handle: int) -> bool:
    """Whether the open file is the one at ``path``: it may have been deleted while we waited."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(handle))
