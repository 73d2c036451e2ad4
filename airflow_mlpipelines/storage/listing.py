"""What is at a path of a remote store, as the store itself tells it: files, sizes, versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.storage.stores import Store

VERSION_PREFIX = "version:"
_VERSION_FIELDS = (
    "etag",
    "ETag",
    "generation",
    "VersionId",
    "version_id",
    "checksum",
    "Content-MD5",
)
_TIME_FIELDS = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a remote store: its path below the listed place, its size and its version.

    Attributes:
        version: As the store tells it, with the name of what it tells: ``etag=…``, ``mtime=…``; None if
            it tells none.
    """

    path: str
    size: int
    version: str | None

    @property
    def names_content(self) -> bool:
        """Whether other bytes would certainly have another version: times and weak tags don't say so."""
        kind, _, value = (self.version or "").partition("=")
        return kind in _VERSION_FIELDS and not value.startswith("W/")


def list_remote(store: Store, path: str) -> tuple[list[RemoteFile], Literal["dir", "file"]]:
    """Return the files at and below a path of a remote store, sorted; none if nothing is there."""
    filesystem, root = store.filesystem, store.remote_path(path)
    with store.translate_errors(path, "looked up"):
        try:
            info: dict[str, Any] = filesystem.info(root)
            if info["type"] == "file":
                if info.get("size") is None:
                    raise DataError(f"{store.uri(path)}: the server does not tell how large it is.")
                return [RemoteFile("", int(info["size"]), _find_version(info))], "file"
            found = filesystem.find(root, detail=True)
        except FileNotFoundError:
            return [], "file"
    base = filesystem._strip_protocol(root).rstrip("/")  # noqa: SLF001 - fsspec's own way to a name
    files = [
        RemoteFile(str(name)[len(base) :].lstrip("/"), int(item["size"]), _find_version(item))
        for name, item in found.items()
        # A name with a slash at its end stands for a folder; consoles make such empty objects.
        if item["type"] == "file" and not str(name).endswith("/")
    ]
    return sorted(files, key=lambda file: file.path), "dir"


def _find_version(info: dict[str, Any]) -> str | None:
    for name in (*_VERSION_FIELDS, *_TIME_FIELDS):
        if info.get(name):
            return f"{name}={info[name]}"
    return None


def digest_versions(store: Store, path: str, files: Sequence[RemoteFile]) -> str:
    """Return ``version:`` and 64 hex digits over the place, and names, sizes and versions of what is there.

    Raises:
        DataError: The store tells no version of a file.
    """
    versions = {file.path: _version_of(store, path, file) for file in files}
    return digest_place(store, path, versions)


def digest_place(store: Store, path: str, versions: Mapping[str, object]) -> str:
    """Return ``version:`` and 64 hex digits over a place and what is told of the files there.

    The place counts: two files may well have one size and one time, and etags are some servers' times.
    """
    # The server, or the account, may be in the connection alone.
    server = [store.arguments.get(name) for name in ("host", "port", "account_name")]
    return f"{VERSION_PREFIX}{digest('data-version-v2', [store.uri(path), server, versions])}"


def _version_of(store: Store, path: str, file: RemoteFile) -> str:
    if file.version is None:
        raise DataError(
            f"{store.uri(path)}: the store tells neither etag, generation nor modification time of "
            f"{file.path or path!r}. Pin this data by content: DataReference(..., pin='content')."
        )
    return f"{file.version}:{file.size}"


def name_version(store: Store, path: str, files: Sequence[RemoteFile]) -> str | None:
    """Return a name that only these bytes at this place ever have; None where the store tells none."""
    if not all(file.names_content for file in files):
        return None
    return digest_versions(store, path, files)
