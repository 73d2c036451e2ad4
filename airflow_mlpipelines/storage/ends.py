"""The two ends of a transfer: files below a path of a datastore, local or remote, seen alike."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.listing import RemoteFile, list_remote
from airflow_mlpipelines.storage.parts import read_part
from airflow_mlpipelines.storage.ranges import read_range
from airflow_mlpipelines.storage.stores import part_beside
from airflow_mlpipelines.storage.trees import walk_tree

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.stores import Store

CHUNK = 8 << 20
_LARGEST_OBJECT_PARTS = 9000


@dataclass(frozen=True)
class Listing:
    """What is at one end: its files by their paths below it, ``""`` for a file itself.

    Attributes:
        kind: A directory or a file; None if nothing is there.
        others: What else a local directory holds, as tree digests take it: path, kind, content.
    """

    files: dict[str, RemoteFile]
    kind: Literal["dir", "file"] | None
    others: tuple[tuple[bytes, bytes, bytes], ...] = ()

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files.values())


class End(ABC):
    """One end of a transfer."""

    def __init__(self, store: Store, path: str) -> None:
        self.store = store
        self.path = path

    @property
    def uri(self) -> str:
        """Its address."""
        return self.store.uri(self.path)

    def below(self, name: str) -> str:
        """Return the path on the datastore of a file below this end; ``""`` is the end itself."""
        return "/".join(part for part in (self.path, name) if part)

    @abstractmethod
    def list(self) -> Listing:
        """Return what is there now."""

    @abstractmethod
    def read(self, name: str) -> IO[bytes]:
        """Open a file for reading."""

    @property
    @abstractmethod
    def has_ranges(self) -> bool:
        """Whether any part of a file can be read, at no more cost than its bytes."""

    @abstractmethod
    def read_part(self, file: RemoteFile, part: Part, stop: threading.Event) -> bytes | memoryview:
        """Return a part of a file; once ``stop`` is set none is wanted any more.

        Raises:
            DataError: The file is other than it was when it was listed.
        """

    @abstractmethod
    def write(self, name: str, size: int) -> Any:
        """Give, as a context, a file to write to; after the context it is there whole, or not at all."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file that is there."""

    @abstractmethod
    def make_others(self, listing: Listing) -> None:
        """Make what is no file, as it is at the other end.

        Raises:
            DataError: The store can't hold what is there.
        """


class LocalEnd(End):
    """Files of this machine."""

    @property
    def _root(self) -> Path:
        return self.store.local_path(self.path)

    def file(self, name: str) -> Path:
        """Return where a file is."""
        return self._root / name if name else self._root

    def list(self) -> Listing:
        """Return what is there now; a file's version is the time of its last change."""
        root = self._root
        if not root.exists():
            return Listing({}, None)
        if not root.is_dir():
            status = root.stat()
            file = RemoteFile("", status.st_size, f"mtime={status.st_mtime_ns}")
            return Listing({"": file}, "file")
        files, others = {}, []
        for path, kind, status in walk_tree(os.fsencode(root)):
            name = os.fsdecode(path)
            if kind == b"f":
                files[name] = RemoteFile(name, status.st_size, f"mtime={status.st_mtime_ns}")
            else:
                text = os.fsencode((root / name).readlink()) if kind == b"l" else b""
                others.append((path, kind, text))
        return Listing(files, "dir", tuple(others))

    def read(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return self.file(name).open("rb")

    @property
    def has_ranges(self) -> bool:
        """They always can."""
        return True

    def read_part(self, file: RemoteFile, part: Part, stop: threading.Event) -> bytes | memoryview:
        """Return a part of a file, which is still as long as it was."""
        del stop
        place = self.file(file.path)
        data = read_part(str(place), part)
        if data is None or place.stat().st_size != file.size:
            raise DataError(
                f"{str(place)!r} had {file.size} bytes, and has others while it is read: somebody writes it."
            )
        return data

    @contextmanager
    def write(self, name: str, size: int) -> Iterator[IO[bytes]]:
        """Give a file beside the target's place, which takes that place in the end."""
        del size
        target = self.file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(part_beside(str(target)))
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def delete(self, name: str) -> None:
        """Delete a file that is there."""
        self.file(name).unlink(missing_ok=True)

    def make_others(self, listing: Listing) -> None:
        """Make directories and symbolic links."""
        if listing.kind == "dir":
            self._root.mkdir(parents=True, exist_ok=True)
        for name, kind, text in sorted(listing.others):
            place = self._root / os.fsdecode(name)
            if kind == b"d":
                place.mkdir(parents=True, exist_ok=True)
            elif not (place.is_symlink() and os.fsencode(place.readlink()) == text):
                place.unlink(missing_ok=True)
                place.symlink_to(os.fsdecode(text))


class RemoteEnd(End):
    """Files of a store that fsspec reaches."""

    def list(self) -> Listing:
        """Return what is there now."""
        files, kind = list_remote(self.store, self.path)
        if not files and not self.store.exists(self.path):
            return Listing({}, None)
        return Listing({file.path: file for file in files}, kind)

    def read(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        place = self.store.remote_path(self.below(name))
        block = CHUNK if self.store.protocol.ranges else 0
        return cast("IO[bytes]", self.store.filesystem.open(place, "rb", block_size=block))

    @property
    def has_ranges(self) -> bool:
        """They can in object stores; elsewhere each part would be a file opened anew."""
        return self.store.protocol.whole_objects and self.store.protocol.ranges

    def read_part(self, file: RemoteFile, part: Part, stop: threading.Event) -> bytes | memoryview:
        """Return a part of a file."""
        return read_range(self.store, self.below(file.path), file, part, stop=stop)

    @contextmanager
    def write(self, name: str, size: int) -> Iterator[IO[bytes]]:
        """Give a file of the store; where it would show in parts, one of another name until the end."""
        block = max(2 * CHUNK, size // _LARGEST_OBJECT_PARTS)
        with self.store.publish(self.below(name)) as place:
            file = self.store.filesystem.open(place, "wb", block_size=block)
            try:
                yield file
            except BaseException:
                with suppress(Exception):  # the error that brought us here is the one to tell
                    if self.store.protocol.whole_objects:
                        # Closing would publish what is there: to fsspec a closed file is a whole one.
                        file.closed = True
                        file.discard()
                    else:
                        file.close()
                raise
            file.close()

    def delete(self, name: str) -> None:
        """Delete a file that is there."""
        self.store.filesystem.rm_file(self.store.remote_path(self.below(name)))

    def make_others(self, listing: Listing) -> None:
        """Make nothing: directories are names of files here.

        Raises:
            DataError: There is a link, an empty directory, or a name that is no UTF-8.
        """
        names = [*map(os.fsencode, listing.files), *(name for name, _, _ in listing.others)]
        parents = {os.path.dirname(name) for name in names}  # noqa: PTH120 - raw bytes
        wrong = [
            f"the file {name!r}, whose name is no UTF-8" for name in names if not _is_text(name)
        ]
        for name, kind, _ in listing.others:
            if kind == b"l":
                wrong.append(f"the symbolic link {os.fsdecode(name)!r}")
            elif name not in parents:
                wrong.append(f"the empty directory {os.fsdecode(name)!r}")
        if listing.kind == "dir" and not names:
            wrong.append("nothing: an empty directory")
        if wrong:
            raise DataError(
                f"the source holds {wrong[0]}, which datastore {self.store.name!r} ({self.store.url}) "
                "can't hold. Change it there, or transfer a part of it.",
                retryable=False,
            )


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def open_end(store: Store, path: str) -> End:
    """Return a path of a datastore as one end of a transfer."""
    return LocalEnd(store, path) if store.is_local else RemoteEnd(store, path)
