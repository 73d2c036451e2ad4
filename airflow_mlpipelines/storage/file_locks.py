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
    handle = _open_locked(path, how, create=create)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _open_locked(path: Path, how: int, *, create: bool) -> int | None:
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
        except FileNotFoundError:
            if not create:
                return None
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


@contextmanager
def lock_directory(path: Path) -> Iterator[bool]:
    """Hold a directory alone, and give True; False if others hold it."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
