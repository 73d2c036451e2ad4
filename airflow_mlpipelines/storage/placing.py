"""Files and trees handed on without letting whoever gets them write to the original."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_READ_ONLY = 0o444
_CLONE = 0x40049409
"""Linux's ``FICLONE``: the new file has the old one's blocks until either is written to."""


def check_inside(path: Path, directory: Path) -> Path:
    """Return ``path``, if it leads to something in ``directory``, also by links.

    A step may have put a link there, to what it may not read itself.

    Raises:
        DataError: It leads out of there.
    """
    if not path.resolve().is_relative_to(directory.resolve()):
        raise DataError(
            "is a symbolic link that leads out of the outputs. Write a copy of the data instead."
        )
    return path


def make_read_only(path: Path) -> None:
    """Take the right to write away from a file, or from all files of a directory.

    The directories keep it: what is in them can't be deleted without.
    """
    for file in _files_of(path):
        os.chmod(file, _READ_ONLY)  # noqa: PTH101 - millions of them, maybe


def make_writable(path: Path) -> None:
    """Give the owner of a file, or of all files of a directory, the right to write."""
    for file in _files_of(path):
        mode = stat.S_IMODE(os.lstat(file).st_mode)
        os.chmod(file, mode | stat.S_IWUSR)  # noqa: PTH101


def _files_of(path: Path) -> Iterator[str]:
    """Yield a file, or all files of a directory but links."""
    if not path.is_dir():
        yield str(path)
        return
    for directory, _, names in os.walk(path):
        for name in names:
            file = os.path.join(directory, name)  # noqa: PTH118 - millions of them, maybe
            if not os.path.islink(file):  # noqa: PTH114
                yield file


def place(blob: Path, target: Path, *, link: bool) -> None:
    """Put a blob's file or tree at ``target``, where nothing is; its files stay read-only.

    Args:
        blob: The original.
        target: Where it shall be.
        link: Whether a hard link will do. Only where the file system itself keeps the user of ``target``
            from writing, as a read-only mount does: a link *is* the original, and rights stop no owner.
    """
    put = _link if link else copy_file
    target.parent.mkdir(parents=True, exist_ok=True)
    if blob.is_dir():
        _place_tree(os.fspath(blob), os.fspath(target), put)
    else:
        put(os.fspath(blob), os.fspath(target))


def place_link(directory: Path, name: str, target: str) -> None:
    """Put a symbolic link to ``target`` into a step's working directory; one that is there already is left.

    Raises:
        DataError: Something else is there.
    """
    link = directory / name
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(target)
    except FileExistsError as error:
        if link.is_symlink() and str(link.readlink()) == target:  # of a try that is adopted
            return
        raise DataError(
            f"path_on_compute is {name!r}, where the step's own files have something already. Choose another path."
        ) from error


def _place_tree(blob: str, target: str, put: Callable[[str, str], None]) -> None:
    os.mkdir(target)  # noqa: PTH102 - thousands of names, here and below
    with os.scandir(blob) as members:
        for member in members:
            place = f"{target}/{member.name}"
            if member.is_symlink():
                os.symlink(os.readlink(member.path), place)  # noqa: PTH115, PTH211
            elif member.is_dir():
                _place_tree(member.path, place, put)
            else:
                put(member.path, place)


def copy_file(source: str, target: str) -> None:
    """Copy a file with its rights, sharing the blocks where the file system can."""
    if not _clone(source, target):
        shutil.copyfile(source, target)
    shutil.copymode(source, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP):
            raise
        copy_file(source, target)


_without_clones: set[tuple[int, int]] = set()
"""The pairs of file systems between which none could be made: to ask for each file costs as much as to copy it."""


def _clone(source: str, target: str) -> bool:
    """Make ``target`` a clone and return True; False where the file system has none, or it is another."""
    with open(source, "rb", buffering=0) as original:  # noqa: PTH123
        parent = os.stat(os.path.dirname(target))  # noqa: PTH116, PTH120
        pair = os.fstat(original.fileno()).st_dev, parent.st_dev
        if pair in _without_clones:
            return False
        with open(target, "wb", buffering=0) as made:  # noqa: PTH123
            try:
                fcntl.ioctl(made.fileno(), _CLONE, original.fileno())
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL):
                    _without_clones.add(pair)
                return False
    return True
