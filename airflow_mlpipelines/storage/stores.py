"""Datastores: named places for data over fsspec; a file store is used in place, without it.

Only what lies in a registered datastore is ever read or written: :meth:`StoreSet.locate` is the one
door through which an address that came from outside (an XCom, a database row) becomes a path.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote
from uuid import uuid4

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines._protocols import find_protocol
from airflow_mlpipelines.exceptions import DataError, StoreError
from airflow_mlpipelines.storage.s3_roles import take_on_role

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from fsspec.spec import AbstractFileSystem

_FILE_SCHEME = "file://"
PART_SUFFIX = ".mlp-part"
"""Ends the name of a file that has not arrived whole yet."""
_NAME_KEPT = 50
"""Characters of a file's name in the name of its part: four bytes each at most, and names have 255 bytes."""
_MAKERS_AT_ONCE = 3
"""Each process that makes the same directories at the same moment may make us fail once."""


def part_beside(path: str) -> str:
    """Return another name in the same directory for a file that has not arrived whole; each call's is its own.

    So two that write the same file at once don't write into each other's.
    """
    directory, slash, name = path.rpartition("/")
    return f"{directory}{slash}{name[:_NAME_KEPT]}.{uuid4().hex[:8]}{PART_SUFFIX}"


def check_path(path: str) -> str:
    """Return a path on a datastore, cleaned of empty and ``.`` parts; the root is an empty string.

    Raises:
        DataError: It is absolute, climbs with ``..``, or holds a null byte.
    """
    if "\0" in path or path.startswith(("/", "~")) or "\\" in path.split("/", 1)[0][:3]:
        raise DataError(f"path {path!r} on a datastore has to be relative to its root")
    parts = [part for part in PurePosixPath(path).parts if part != "."]
    if ".." in parts:
        raise DataError(f"path {path!r} climbs out of its datastore with '..'")
    return "/".join(parts)


class Store:
    """One datastore.

    Attributes:
        name: Its name in the workspace.
        url: Its root, without a trailing slash.
        protocol: How a store of its kind behaves.
        arguments: What its fsspec filesystem was made with, secrets included.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        filesystem: AbstractFileSystem | None,
        root: str,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.url = url
        self.protocol = find_protocol(url)
        self.arguments = dict(arguments or {})
        self._filesystem = filesystem
        self._root = root
        self._made: set[str] = set()
        self._making = threading.Lock()

    @property
    def is_local(self) -> bool:
        """Whether its data are files of this machine, which are used where they are."""
        return self._filesystem is None

    @property
    def filesystem(self) -> AbstractFileSystem:
        """The fsspec filesystem of a store that is not local."""
        if self._filesystem is None:
            raise DataError(f"datastore {self.name!r} is a directory and has no remote filesystem")
        if self.protocol.per_thread:  # fsspec keeps one for each thread that asks so
            known = self._filesystem
            return type(known)(*known.storage_args, **known.storage_options)
        return self._filesystem

    def local_path(self, path: str) -> Path:
        """Return where on this machine ``path`` is.

        Raises:
            DataError: The store is not local, or the path leads out of it.
        """
        if not self.is_local:
            raise DataError(f"datastore {self.name!r} ({self.url}) is no directory of this machine")
        return Path(self._root, check_path(path))

    def remote_path(self, path: str) -> str:
        """Return ``path`` as the fsspec filesystem wants it."""
        clean = check_path(path)
        return f"{self._root}/{clean}" if clean else self._root

    def uri(self, path: str) -> str:
        """Return the address of ``path``: the store's URL and the path, quoted for file stores."""
        clean = check_path(path)
        if self.is_local:
            clean = quote(clean.encode("utf-8", "surrogateescape"))
        return f"{self.url}/{clean}" if clean else self.url

    def path_of(self, uri: str) -> str | None:
        """Return the path that ``uri`` has on this store, or None if it is not on it."""
        if uri != self.url and not uri.startswith(f"{self.url}/"):
            return None
        path = uri[len(self.url) + 1 :]
        if self.is_local:
            path = unquote(path, errors="surrogateescape")
        return path

    def exists(self, path: str) -> bool:
        """Whether a file or a directory is at ``path``.

        Raises:
            DataError: The store can't be asked, or its bucket is not there.
        """
        if self.is_local:
            return os.path.lexists(self.local_path(path))
        place = self.remote_path(path)
        with self.translate_errors(path, "looked up"):
            found = bool(self.filesystem.exists(place))
        if not found:
            self._check_bucket()
        return found

    def _check_bucket(self) -> None:
        """Raise if the bucket is not there; one that may not be looked at counts as there."""
        if not self.protocol.buckets:
            return
        bucket = self._root.partition("/")[0]
        try:
            self.filesystem.info(bucket)
        except FileNotFoundError:
            raise StoreError(
                f"datastore {self.name!r}: the bucket {bucket!r} of {self.url} is not there. "
                "Correct its url in the workspace file, or make the bucket."
            ) from None
        except OSError:
            return

    @contextmanager
    def translate_errors(self, path: str, what: str) -> Iterator[None]:
        """Raise what the store's driver raises inside as an error that names the datastore.

        Args:
            path: What is worked on.
            what: What is done to it, as in "can't be read".

        Raises:
            StoreError: The driver raised something.
        """
        # Drivers raise what their client libraries have: botocore's errors are no OSErrors.
        expected = OSError if self.is_local else Exception
        try:
            yield
        except DataError:
            raise
        except expected as error:
            hint = ""
            if isinstance(error, PermissionError) and not self.is_local:
                hint = " Check the credentials in its Airflow connection, and what they allow."
            raise StoreError(
                f"datastore {self.name!r}: {self.uri(path)} can't be {what}: "
                f"{str(error).rstrip('.') or type(error).__name__}.{hint}"
            ) from error

    def read_bytes(self, path: str) -> bytes:
        """Return the content of the file at ``path``.

        Raises:
            DataError: There is none, or it can't be read.
        """
        with self.translate_errors(path, "read"):
            if self.is_local:
                return self.local_path(path).read_bytes()
            return bytes(self.filesystem.cat_file(self.remote_path(path)))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            DataError: It can't be written.
        """
        with self.translate_errors(path, "written"):
            if self.is_local:
                _write_atomically(self.local_path(path), data)
            else:
                with self.publish(path) as place:
                    self.filesystem.pipe_file(place, data)

    @contextmanager
    def publish(self, path: str) -> Iterator[str]:
        """Give the place of a remote store to write a file to, which is then whole at ``path``.

        Object stores show an object only when it is complete. In others it is another place, in a
        directory that has been made; what was at ``path`` is replaced.
        """
        filesystem, target = self.filesystem, self.remote_path(path)
        if self.protocol.whole_objects:
            yield target
            return
        self._make_directory(str(PurePosixPath(target).parent))
        place = part_beside(target)
        try:
            yield place
            if filesystem.exists(target):
                with suppress(FileNotFoundError):  # another one that replaces it was quicker
                    filesystem.rm_file(target)
            filesystem.mv(place, target)
        except BaseException:
            with suppress(Exception):  # the error that brought us here is the one to tell
                filesystem.rm_file(place)
            raise

    def _make_directory(self, directory: str) -> None:
        """Make a directory and those above it, once for all who write into it."""
        with self._making:
            if directory in self._made:
                return
            for _ in range(_MAKERS_AT_ONCE):
                with suppress(Exception):  # whatever the driver says where another was quicker
                    self.filesystem.makedirs(directory, exist_ok=True)
                if self.filesystem.isdir(directory):
                    break
            else:
                self.filesystem.makedirs(directory, exist_ok=True)
            self._made.add(directory)

    def delete(self, path: str) -> None:
        """Delete the file or directory at ``path``; nothing happens if there is none."""
        if self.is_local:
            target = self.local_path(path)
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
        elif self.exists(path):
            with self.translate_errors(path, "deleted"):
                self.filesystem.rm(self.remote_path(path), recursive=True)
            self._made.clear()

    def __repr__(self) -> str:
        return f"Store({self.name!r}, {self.url!r})"


def _write_atomically(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:60]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101 - mkstemp makes files for the owner alone
        os.replace(temporary, target)  # noqa: PTH105 - both are plain strings here
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def open_store(
    name: str,
    url: str,
    *,
    options: Mapping[str, Any] | None = None,
    credentials: Mapping[str, Any] | None = None,
) -> Store:
    """Return the datastore at ``url``; nothing is looked up there yet.

    Args:
        name: Its name in the workspace.
        url: ``file:///directory``, or anything that fsspec understands.
        options: Arguments for the fsspec filesystem that anybody may see.
        credentials: Arguments that nobody may.

    Raises:
        DataError: The protocol is unknown, or its driver is not installed.
    """
    url = url.rstrip("/")
    if url.startswith(_FILE_SCHEME):
        root = unquote(url[len(_FILE_SCHEME) :]) or "/"
        if not os.path.isabs(root):  # noqa: PTH117 - a string until it is known to be a path
            raise DataError(
                f"datastore {name!r}: {url!r} needs an absolute path: file:///directory"
            )
        return Store(name, url, filesystem=None, root=root)
    from fsspec.core import url_to_fs
    from fsspec.dircache import DirCache

    protocol = find_protocol(url)
    arguments = {**(options or {}), **(credentials or {})}
    try:
        given = take_on_role(arguments) if protocol.name == "S3" else arguments
        filesystem, root = url_to_fs(url, **given)
    except ImportError as error:
        hint = "Install its fsspec driver."
        if protocol.extra is not None:
            hint = f"Install the extra 'airflow-mlpipelines[{protocol.extra}]'."
        raise DataError(
            f"datastore {name!r}: {url!r} needs the driver of {protocol.name}, which is not installed "
            f"({error}). {hint}"
        ) from error
    except Exception as error:
        # Some drivers connect at once, and raise what their client libraries have.
        raise DataError(
            f"datastore {name!r}: {url!r} can't be opened: {str(error) or type(error).__name__}. Check its url, "
            "its options and its Airflow connection."
        ) from error
    listings = getattr(filesystem, "dircache", None)
    if isinstance(listings, DirCache):
        # Others write to the store too: what was listed a moment ago tells nothing of now.
        listings.use_listings_cache = False
        listings.clear()
    return Store(name, url, filesystem=filesystem, root=root.rstrip("/"), arguments=arguments)


class StoreSet:
    """The registered datastores of a run: the only places to read from and to write to."""

    def __init__(self, stores: Iterable[Store], default: str) -> None:
        self._stores = {store.name: store for store in stores}
        self._default = default
        # The longest URL first: a store may lie inside another one.
        self._by_length = sorted(self._stores.values(), key=lambda store: -len(store.url))

    def __getitem__(self, name: str) -> Store:
        """Return the store of this name.

        Raises:
            DataError: There is none.
        """
        try:
            return self._stores[name]
        except KeyError:
            raise DataError(
                f"datastore {name!r} is not registered; there are {list_options(self._stores)}."
                f"{suggest(name, self._stores)}"
            ) from None

    @property
    def default(self) -> Store:
        """The store for snapshots and large values."""
        return self[self._default]

    def locate(self, uri: str) -> tuple[Store, str]:
        """Return the store that ``uri`` lies on, and its path there.

        Raises:
            DataError: It lies on no registered datastore, or leads out of it.
        """
        for store in self._by_length:
            path = store.path_of(uri)
            if path is not None:
                return store, check_path(path)
        raise DataError(
            "an artifact's address lies in no registered datastore; there are "
            f"{list_options(self._stores)}. It is not read."
        )
