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
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import DIGEST_PREFIX, digest
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.disk_space import (
    FullDiskError,
    check_space,
    telling_full_disk,
)
from airflow_mlpipelines.storage.file_locks import lock_directory, lock_file
from airflow_mlpipelines.storage.placing import make_read_only
from airflow_mlpipelines.storage.trees import digest_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK = ".lock"
_INCOMING = "incoming"
_VERSIONS = "versions"
_FRESH_SECONDS = 60.0
"""A room this young may be about to be locked by whoever made it."""
_BROKEN = "part-"
_BROKEN_SECONDS = 24 * 3600.0
"""So long a fetch that broke off is kept for somebody to go on with."""
_VERSIONS_KEPT_SECONDS = 30 * 24 * 3600.0
_MOST = 50 << 30
_SHARE_OF_DISK = 10


Fetch = Callable[[Path], str | None]
"""Writes a file or directory to the path that it is given; returns its digest if it has taken it. What it leaves beside
that path when it fails is there for the next call with the same blob, to go on from."""


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
    def use(self, digest: str, size: int, fetch: Fetch) -> Iterator[Path]:
        """Give the blob, fetched if it is not here yet. It is not thrown away before the context ends.

        Of several processes that want it at once, one fetches it. It is not to be written: see
        :func:`~airflow_mlpipelines.storage.placing.place` for a copy to hand on.

        Args:
            digest: ``blake3:`` and 64 hex digits; what is fetched must have it. Another form names
                data by the store's own version, which can't be checked.
            size: Bytes that it will have.
            fetch: Fetches it.

        Raises:
            DataError: What was fetched has another digest.
            FullDiskError: It doesn't fit on the disk.
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
                        self._fetch(digest, size, fetch)
                        fetched = True
        finally:
            if fetched:
                self._make_room(0)

    def add(self, size: int, fetch: Fetch, *, name: str | None = None) -> str:
        """Return the digest of data that nobody has read yet; they are fetched, and kept.

        Args:
            size: Bytes that they have.
            fetch: Fetches them.
            name: By what a fetch that broke off is known again; None if it shall not be.

        Raises:
            FullDiskError: They don't fit on the disk.
        """
        with self._room(name) as room:
            self._make_room(size, own=room)
            made = room / "blob"
            with self._space_for(size, room):
                found = fetch(made) or digest_tree(made).digest
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
            self._make_room(size, own=made.parent)
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

    def _fetch(self, digest: str, size: int, fetch: Fetch) -> None:
        with self._room(digest) as room:
            self._make_room(size, own=room)
            made = room / "blob"
            went_on = any(room.iterdir())
            with self._space_for(size, room):
                found = self._fetch_checked(digest, made, fetch)
                if (
                    found != digest and went_on
                ):  # what an earlier try has left was not what it seemed
                    _empty(room)
                    found = self._fetch_checked(digest, made, fetch)
            if found != digest:
                _empty(room)
                raise DataError(
                    f"fetched data have the digest {found}, not {digest}: they were changed or cut "
                    "short. Nothing of them is used."
                )
            make_read_only(made)
            self._publish(made, self.path_of(digest), size)

    @contextmanager
    def _space_for(self, size: int, room: Path) -> Iterator[None]:
        """Raise what is told of a full disk, now or in the middle, in words."""
        left = _measure(room)
        try:
            check_space(room, size - left, limit=self.limit)
            with telling_full_disk(room, size - left, limit=self.limit):
                yield
        except FullDiskError:
            _empty(room)  # half of it is of no use, and its room is
            raise

    @staticmethod
    def _fetch_checked(digest: str, made: Path, fetch: Fetch) -> str:
        """Return the digest of what was fetched; ``digest`` itself where that can't be checked."""
        found = fetch(made)
        if not digest.startswith(DIGEST_PREFIX):
            return digest
        return found or digest_tree(made).digest

    def _publish(self, made: Path, target: Path, size: int) -> None:
        """Move a blob to where it stays. The record comes first: what is there always has one."""
        self._lock_of(target).write_text(str(size), encoding="ascii")
        made.replace(target)

    # ---- the limit -------------------------------------------------------------------------

    def _make_room(self, wanted: int, *, own: Path | None = None) -> None:
        """Throw away what was used longest ago, and nobody uses now, until ``wanted`` bytes fit in.

        Args:
            wanted: Bytes that are to come, or that have come and are to stay.
            own: The room that its caller works in. What lies there is a share of ``wanted``: it neither
                counts again nor goes.
        """
        records = []
        for lock in self._directory.glob(f"??/*{_LOCK}"):
            with suppress(OSError, ValueError):  # thrown away, or being made
                size = int(lock.read_text(encoding="ascii") or 0)
                records.append((lock.stat().st_mtime_ns, size, lock))
        rooms = (self._directory / _INCOMING).glob(f"{_BROKEN}*")
        broken = sorted((room for room in rooms if room != own), key=_last_used)
        total = sum(size for _, size, _ in records) + sum(map(_measure, broken))
        # What can never fit makes no room for itself: it would only empty the cache.
        room = self.limit - (wanted if wanted <= self.limit else 0)
        for left in broken:  # data that are not whole are the least loss
            if total > room:
                with suppress(OSError):
                    total -= self._delete_room(left)
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
            kept = _BROKEN_SECONDS if room.name.startswith(_BROKEN) else _FRESH_SECONDS
            with suppress(OSError):
                if now - room.stat().st_mtime > kept:
                    self._delete_room(room)
        for version in (self._directory / _VERSIONS).glob("??/*"):
            with suppress(OSError):
                if now - version.stat().st_mtime > _VERSIONS_KEPT_SECONDS:
                    version.unlink()

    @staticmethod
    def _delete_room(room: Path) -> int:
        """Delete a room in which nobody works; return the bytes that it took."""
        with lock_directory(room, create=False) as held:
            if not held:
                return 0
            size = _measure(room)
            shutil.rmtree(room, ignore_errors=True)
            return size

    @contextmanager
    def _room(self, name: str | None = None) -> Iterator[Path]:
        """Give a directory on the same file system to work in.

        Args:
            name: Whoever asks for it by the same name after work in it has failed finds it as it was left.
        """
        base = self._directory / _INCOMING
        base.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            room = None
            if name is not None:
                room = base / f"{_BROKEN}{digest('blob-room-v1', name)[:40]}"
                if not held.enter_context(lock_directory(room)):  # another process works there
                    room = None
            if room is None:
                room = Path(tempfile.mkdtemp(dir=base, prefix=f"{os.getpid()}-"))
                held.enter_context(lock_directory(room))
                name = None
            os.utime(room)
            try:
                yield room
            except BaseException:
                if (
                    name is None or len(list(room.iterdir())) < 2
                ):  # nothing is noted beside the data
                    shutil.rmtree(room, ignore_errors=True)
                raise
            shutil.rmtree(room, ignore_errors=True)


def _last_used(room: Path) -> float:
    with suppress(OSError):
        return room.stat().st_mtime
    return 0.0


def _empty(room: Path) -> None:
    for member in room.iterdir():
        if member.is_dir():
            shutil.rmtree(member)
        else:
            member.unlink()


def _measure(room: Path) -> int:
    """Return the bytes of disk that a directory takes."""
    size = 0
    for directory, _, names in os.walk(room):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(directory, name)).st_blocks * 512  # noqa: PTH118 - maybe thousands
    return size
