"""Data fetched from remote datastores, kept on the worker by digest.

Every file or tree is there whole or not at all, so processes may share it. What is found damaged is
thrown away and fetched again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import DIGEST_PREFIX
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.trees import digest_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class BlobCache:
    """A directory of files and trees, named by their digests."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path_of(self, digest: str) -> Path:
        """Return where the blob of this digest is, or would be."""
        name = digest.removeprefix(DIGEST_PREFIX).replace(":", "-")
        return self._directory / name[:2] / name

    def get(self, digest: str, fetch: Callable[[Path], None]) -> Path:
        """Return the blob, fetched if it is not here yet.

        Args:
            digest: ``blake3:`` and 64 hex digits; what is fetched must have it. Another form names
                data by the store's own version, which can't be checked.
            fetch: Writes the file or directory to the path that it is given.

        Raises:
            DataError: What was fetched has another digest.
        """
        target = self.path_of(digest)
        if target.exists():
            return target
        with self._room() as room:
            made = room / "blob"
            fetch(made)
            if digest.startswith(DIGEST_PREFIX):
                found = digest_tree(made).digest
                if found != digest:
                    raise DataError(
                        f"fetched data have the digest {found}, not {digest}: they were changed or cut "
                        "short. Nothing of them is used."
                    )
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                made.replace(target)
            except OSError:  # another process was quicker; its blob is as good
                if not target.exists():
                    raise
        return target

    def discard(self, digest: str) -> None:
        """Throw a blob away, for one that was found damaged."""
        target = self.path_of(digest)
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)

    @contextmanager
    def _room(self) -> Iterator[Path]:
        """Give a directory on the same file system to work in."""
        from pathlib import Path

        base = self._directory / "incoming"
        base.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=base, prefix=f"{os.getpid()}-"))
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)
