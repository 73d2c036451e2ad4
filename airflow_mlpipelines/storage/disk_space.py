"""Room on this machine's disk: asked for before data are fetched, and told in words where it ends."""

from __future__ import annotations

import errno
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_mlpipelines._units import show_size
from airflow_mlpipelines.exceptions import DataError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FullDiskError(DataError):
    """This machine's disk has no room for data that are to be fetched."""


def check_space(directory: Path, wanted: int, *, limit: int) -> None:
    """Raise if the disk of a directory has less free than what is wanted.

    Args:
        directory: Where data will be written.
        wanted: Bytes that they will take.
        limit: Bytes that the blob cache may hold, for the message.

    Raises:
        FullDiskError: It has.
    """
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise _full(directory, wanted, limit)


@contextmanager
def telling_full_disk(directory: Path, wanted: int, *, limit: int) -> Iterator[None]:
    """Raise as a :class:`FullDiskError` what is raised inside because the disk of a directory is full."""
    try:
        yield
    except (OSError, StoreError) as error:
        cause = error.__cause__ if isinstance(error, StoreError) else error
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise _full(directory, wanted, limit) from error
        raise


def _full(directory: Path, wanted: int, limit: int) -> FullDiskError:
    free = shutil.disk_usage(directory).free
    return FullDiskError(
        f"this machine's disk is full: {show_size(wanted)} of data are to go to {str(directory)!r}, where "
        f"{show_size(free)} are free. Other data that were fetched take {show_size(limit)} there at most: lower "
        "[mlpipelines] blob_cache_size, make room, or put $AIRFLOW_HOME on a larger disk. An input in mode 'direct' "
        "is not fetched."
    )
