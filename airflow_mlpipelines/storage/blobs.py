"""Data fetched from remote datastores, kept on the worker by digest, up to a limit.

Every file or tree is there whole or not at all, so processes may share it. Beside each lies a file that is
its lock and its record: the size in it, and the last use as its time. Who uses a blob holds the lock shared;
who fetches or throws away holds it alone; the kernel gives it back when a process is lost.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import DIGEST_PREFIX, digest
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.file_locks import lock_directory, lock_file
from airflow_mlpipelines.storage.placing import make_read_only
from airflow_mlpipelines.storage.trees import digest_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LOCK = ".lock"
_INCOMING = "incoming"
_VERSIONS = "versions"
_FRESH_SECONDS = 60.0
"""A room this young may be about to be locked by whoever made it."""
_VERSIONS_KEPT_SECONDS = 30 * 24 * 3600.0
_MOST = 50 << 30
_SHARE_OF_DISK = 10


class BlobCache:
    """A directory of files and trees, named by their digests.

    Args:
        directory: Where they are; it need not be there yet.
        limit: Bytes that it may hold in all. None is a tenth of its disk, and at most 50 GiB.
    """

    def __init__(self, directory: Path, *, limit: int | None = None) -> None:
        self._directory = directory
        self._limit = limit

    @property
    def limit(self) -> int:
        """Bytes that it may hold in all."""
        if self._limit is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._limit = min(_MOST, shutil.disk_usage(self._directory).total // _SHARE_OF_DISK)
        return self._limit

    def path_of(self, digest: str) -> Path:
        """Return where the blob of this digest is, or would be."""
        name = digest.removeprefix(DIGEST_PREFIX).replace(":", "-")
        return self._directory / name[:2] / name

    @contextmanager
    def use(self, digest: str, size: int, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """Give the blob, fetched if it is not here yet. It is not thrown away before the context ends.

        Of several processes that want it at once, one fetches it. It is not to be written: see
        :func:`~airflow_mlpipelines.storage.placing.place` for a copy to hand on.

        Args:
            digest: ``blake3:`` and 64 hex digits; what is fetched must have it. Another form names
                data by the store's own version, which can't be checked.
            size: Bytes that it will have.
            fetch: Writes the file or directory to the path that it is given.

        Raises:
            DataError: What was fetched has another digest.
        """
        target = self.path_of(digest)
        fetched = False
        try:
            while True:
                with lock_file(self._lock_of(target), shared=True):
                    if target.exists():
                        os.utime(self._lock_of(target))
                        yield target
                        return
                # The two are apart: a lock can't be made a shared one without letting go of it.
                with lock_file(self._lock_of(target), shared=False):
                    if not target.exists():
                        self._make_room(size)
                        self._fetch(digest, size, fetch)
                        fetched = True
        finally:
            if fetched:
                self._make_room(0)

    def add(self, size: int, fetch: Callable[[Path], None]) -> str:
        """Return the digest of data that nobody has read yet; they are fetched, and kept.

        Args:
            size: Bytes that they have.
            fetch: Writes the file or directory to the path that it is given.
        """
        self._make_room(size)
        with self._room() as room:
            made = room / "blob"
            fetch(made)
            found = digest_tree(made).digest
            self.adopt(found, size, made)
        return found

    def adopt(self, digest: str, size: int, made: Path) -> None:
        """Take over a file or tree that is known to have this digest; it is gone from its place then.

        Nothing happens where it is here already, is larger than the limit, or can't be moved.
        """
        target = self.path_of(digest)
        if size > self.limit:
            return
        with lock_file(self._lock_of(target), shared=False, wait=False) as held:
            if not held or target.exists():
                return
            self._make_room(size)
            with suppress(OSError):  # of another user, or on another disk: it is only not kept
                make_read_only(made)
                self._publish(made, target, size)

    def discard(self, digest: str) -> None:
        """Throw a blob away, for one that was found damaged."""
        target = self.path_of(digest)
        with lock_file(self._lock_of(target), shared=False):
            self._remove(target)

    def content_of(self, version: str) -> str | None:
        """Return the digest of data that a store told this version of, if they were read before."""
        with suppress(OSError):
            file = self._version_file(version)
            os.utime(file)
            return file.read_text(encoding="ascii")
        return None

    def note_content(self, version: str, content: str) -> None:
        """Remember the digest of data that a store tells this version of."""
        file = self._version_file(version)
        with self._room() as room:
            (room / "version").write_text(content, encoding="ascii")
            file.parent.mkdir(parents=True, exist_ok=True)
            (room / "version").replace(file)

    def _version_file(self, version: str) -> Path:
        name = digest("data-content-v1", version)
        return self._directory / _VERSIONS / name[:2] / name

    @staticmethod
    def _lock_of(target: Path) -> Path:
        return target.with_name(f"{target.name}{_LOCK}")

    def _fetch(self, digest: str, size: int, fetch: Callable[[Path], None]) -> None:
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
            make_read_only(made)
            self._publish(made, self.path_of(digest), size)

    def _publish(self, made: Path, target: Path, size: int) -> None:
        """Move a blob to where it stays. The record comes first: what is there always has one."""
        self._lock_of(target).write_text(str(size), encoding="ascii")
        made.replace(target)

    # ---- the limit -------------------------------------------------------------------------

    def _make_room(self, wanted: int) -> None:
        """Throw away what was used longest ago, and nobody uses now, until ``wanted`` bytes fit in."""
        records = []
        for lock in self._directory.glob(f"??/*{_LOCK}"):
            with suppress(OSError, ValueError):  # thrown away, or being made
                size = int(lock.read_text(encoding="ascii") or 0)
                records.append((lock.stat().st_mtime_ns, size, lock))
        total = sum(size for _, size, _ in records)
        # What can never fit makes no room for itself: it would only empty the cache.
        room = self.limit - (wanted if wanted <= self.limit else 0)
        if total > room:
            # What alone is too much goes first, or all that was used before it would go for it.
            for used, size, lock in sorted(records, key=lambda it: (it[1] <= self.limit, it[0])):
                if total > room and self._evict(lock, used):
                    total -= size
        self._clean()

    def _evict(self, lock: Path, used: int) -> bool:
        """Throw a blob away and return True, unless somebody uses it or has since it was looked at."""
        with lock_file(lock, shared=False, wait=False, create=False) as held:
            if not held or lock.stat().st_mtime_ns != used:
                return False
            self._remove(lock.with_name(lock.name.removesuffix(_LOCK)))
            lock.unlink()
            return True

    def _remove(self, target: Path) -> None:
        """Take a blob away at once, whole, and then delete it."""
        with self._room() as room, suppress(FileNotFoundError):
            target.replace(room / "blob")

    def _clean(self) -> None:
        """Delete what lost processes left, and versions that nobody has asked for in a long time."""
        now = time.time()
        for room in (self._directory / _INCOMING).glob("*"):
            with suppress(OSError):
                if now - room.stat().st_mtime < _FRESH_SECONDS:
                    continue
                with lock_directory(room) as held:
                    if held:
                        shutil.rmtree(room, ignore_errors=True)
        for version in (self._directory / _VERSIONS).glob("??/*"):
            with suppress(OSError):
                if now - version.stat().st_mtime > _VERSIONS_KEPT_SECONDS:
                    version.unlink()

    @contextmanager
    def _room(self) -> Iterator[Path]:
        """Give a directory on the same file system to work in."""
        base = self._directory / _INCOMING
        base.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=base, prefix=f"{os.getpid()}-"))
        try:
            with lock_directory(room):
                yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)
