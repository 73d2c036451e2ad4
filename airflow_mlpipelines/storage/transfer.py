"""Artifacts made, fetched and checked: data between datastores and the worker's disk."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlpipelines._digest import digest as digest_value
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.trees import digest_tree, walk_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.stat_cache import StatCache
    from airflow_mlpipelines.storage.stores import Store, StoreSet

_TRANSFERS = 8
_VERSION_PREFIX = "version:"
_VERSION_FIELDS = ("etag", "ETag", "generation", "VersionId", "version_id", "checksum")
_TIME_FIELDS = ("LastModified", "last_modified", "mtime", "updated", "created")


@dataclass(frozen=True)
class _RemoteFile:
    """A file of a remote store: its path below the listed place, its size and its version."""

    path: str
    size: int
    version: str | None


# ---- external data -----------------------------------------------------------------------------


def pin_external(
    store: Store,
    path: str,
    *,
    how: Literal["content", "version"] = "content",
    cache: StatCache | None = None,
    blobs: BlobCache | None = None,
) -> Artifact | None:
    """Return what is at ``path`` now, or None if nothing is there.

    Args:
        store: The datastore.
        path: A file or a directory on it.
        how: ``content`` reads the data (or knows them unread from ``cache``); ``version`` believes the
            store: etag or generation, else modification time and size.
        cache: Digests of local files that were read before.
        blobs: Where data read from a remote store are kept, so that the step need not fetch them again.

    Raises:
        DataError: The data can't be read, or the store tells no version.
    """
    if not store.exists(path):
        return None
    if store.is_local:
        return _pin_local(store, path, how, cache)
    files, kind = _list_remote(store, path)
    size = sum(file.size for file in files)
    if how == "version":
        digest = _digest_versions(store, path, files)
    else:
        digest = _digest_remote(store, path, files, kind, blobs)
    return Artifact(store.uri(path), digest, size, len(files), kind)


def _pin_local(
    store: Store, path: str, how: Literal["content", "version"], cache: StatCache | None
) -> Artifact:
    target = store.local_path(path)
    if how == "content":
        tree = digest_tree(target, cache=cache)
        return Artifact(store.uri(path), tree.digest, tree.size, tree.files, tree.kind)
    if target.is_file():
        status = target.stat()
        seen: dict[str, list[int]] = {"": [status.st_size, status.st_mtime_ns]}
        kind: Literal["dir", "file"] = "file"
    else:
        kind = "dir"
        seen = {
            os.fsdecode(entry.path): [entry.stat.st_size, entry.stat.st_mtime_ns]
            for entry in walk_tree(os.fsencode(target))
            if entry.kind != b"d"
        }
    digest = f"{_VERSION_PREFIX}{digest_value('data-version-v1', seen)}"
    return Artifact(
        store.uri(path), digest, sum(size for size, _ in seen.values()), len(seen), kind
    )


def _digest_versions(store: Store, path: str, files: list[_RemoteFile]) -> str:
    versions = {file.path: _version_of(store, path, file) for file in files}
    return f"{_VERSION_PREFIX}{digest_value('data-version-v1', versions)}"


def _version_of(store: Store, path: str, file: _RemoteFile) -> str:
    if file.version is None:
        raise DataError(
            f"{store.uri(path)}: the store tells neither etag, generation nor modification time of "
            f"{file.path or path!r}. Pin this data by content: DataReference(..., pin='content')."
        )
    return f"{file.version}:{file.size}"


def _digest_remote(
    store: Store,
    path: str,
    files: list[_RemoteFile],
    kind: Literal["dir", "file"],
    blobs: BlobCache | None,
) -> str:
    """Return the content's digest, read once per version that the store tells."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mlpipelines-pin-") as room:
        target = Path(room, "data")
        _download(store, path, files, kind, target)
        digest = digest_tree(target).digest
        if blobs is not None:

            def move(made: Path) -> None:
                shutil.move(target, made)

            blobs.get(digest, move)
    return digest


# ---- outputs -----------------------------------------------------------------------------------


def commit_output(
    store: Store,
    path: str,
    source: Path,
    *,
    step_run: str,
    expect_directory: bool | None = None,
    cache: StatCache | None = None,
) -> Artifact:
    """Return the artifact of an output that its step has made, once it is where it stays.

    Args:
        store: The datastore that the output goes to.
        path: Where it goes.
        source: What the step made. If that is the place already, nothing is copied.
        step_run: The id of the step run.
        expect_directory: Whether it has to be a directory or a file; None takes either.
        cache: Digests of local files that were read before.

    Raises:
        DataError: It was not made, is of the wrong kind, or did not arrive as it was.
    """
    if not source.exists():
        raise DataError(
            "was not made. The program has to write it at the path that it is given "
            f"({'a directory, which it makes itself' if expect_directory else 'a file or a directory'})."
        )
    tree = digest_tree(source, cache=cache)
    if expect_directory is not None and expect_directory != (tree.kind == "dir"):
        made, wanted = ("a file", "a directory") if expect_directory else ("a directory", "a file")
        raise DataError(f"is {made}, but was declared as {wanted}.")
    if not store.is_local:
        _upload(store, path, source, tree.size)
    elif store.local_path(path) != source:
        _put_in_place(source, store.local_path(path))
    return Artifact(store.uri(path), tree.digest, tree.size, tree.files, tree.kind, None, step_run)


def _put_in_place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError:  # another file system
        shutil.move(str(source), str(target))


def _upload(store: Store, path: str, source: Path, size: int) -> None:
    pairs = [(source, "")] if source.is_file() else _pair_members(source)
    filesystem = store.filesystem

    def put(pair: tuple[Path, str]) -> None:
        filesystem.put_file(str(pair[0]), store.remote_path(_join(path, pair[1])))

    with store.translate_errors(path, "written"), ThreadPoolExecutor(_TRANSFERS) as pool:
        list(pool.map(put, pairs))
    files, _ = _list_remote(store, path)
    arrived = {file.path for file in files}
    lost = sorted(name for _, name in pairs if name not in arrived)
    if lost or len(arrived) != len(pairs) or sum(file.size for file in files) != size:
        said = f": {lost[0]!r} is not there under its name" if lost and lost[0] else ""
        raise DataError(f"did not arrive whole at {store.uri(path)}{said}.")


def _join(path: str, name: str) -> str:
    return "/".join(part for part in (path, name) if part)


def _pair_members(source: Path) -> list[tuple[Path, str]]:
    """Return each file of a directory with its path below the directory.

    Raises:
        DataError: The directory holds what an object store can't hold.
    """
    entries = list(walk_tree(os.fsencode(source)))
    if not entries:
        raise DataError(
            "is an empty directory, which an object store can't hold. Write a file into it, even one "
            "that says that there is nothing."
        )
    parents = {os.path.dirname(entry.path) for entry in entries}  # noqa: PTH120 - raw bytes
    for entry in entries:
        name = os.fsdecode(entry.path)
        if entry.kind == b"l":
            raise DataError(
                f"holds the symbolic link {name!r}, which an object store can't hold. Write a copy of "
                "the file instead."
            )
        if entry.kind == b"d" and entry.path not in parents:
            raise DataError(
                f"holds the empty directory {name!r}, which an object store can't hold. Put a file "
                "into it, or remove it."
            )
        try:
            entry.path.decode()
        except UnicodeDecodeError:
            raise DataError(
                f"holds a file named {entry.path!r}, which is no UTF-8, as names in an object store "
                "have to be. Rename it."
            ) from None
    return [
        (source / os.fsdecode(entry.path), os.fsdecode(entry.path))
        for entry in entries
        if entry.kind == b"f"
    ]


# ---- inputs ------------------------------------------------------------------------------------


def fetch(artifact: Artifact, stores: StoreSet, *, blobs: BlobCache, target: Path) -> Path:
    """Return where on this machine the artifact's data are.

    Data on a file store are used where they are. Others come through the blob cache to ``target``; what
    is there already is left as it is, since a program of an earlier try may be reading it.

    Raises:
        DataError: The data are gone, are other than the artifact says, or lie in no registered
            datastore.
    """
    store, path = stores.locate(artifact.uri)
    if store.is_local:
        place = store.local_path(path)
        if not place.exists():
            raise DataError(f"{artifact.uri} is gone. Run the step that makes it once more.")
        return place
    if os.path.lexists(target):
        return target
    if not store.exists(path):
        raise DataError(f"{artifact.uri} is gone. Run the step that makes it once more.")
    files, kind = _list_remote(store, path)
    if artifact.digest.startswith(_VERSION_PREFIX):
        _check_version(artifact, store, path, files)
    blob = blobs.get(artifact.digest, lambda made: _download(store, path, files, kind, made))
    target.parent.mkdir(parents=True, exist_ok=True)
    if blob.is_dir():
        shutil.copytree(blob, target, symlinks=True)
    else:
        shutil.copy2(blob, target)
    return target


def _check_version(artifact: Artifact, store: Store, path: str, files: list[_RemoteFile]) -> None:
    """Raise if the store tells another version than when the data were pinned."""
    if _digest_versions(store, path, files) != artifact.digest:
        raise DataError(
            f"{artifact.uri} was changed after this run had looked it up. Start a new run, which takes "
            "it as it is now."
        )


def _download(
    store: Store, path: str, files: list[_RemoteFile], kind: Literal["dir", "file"], target: Path
) -> None:
    filesystem = store.filesystem

    def get(file: _RemoteFile) -> None:
        local = target / file.path if kind == "dir" else target
        local.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(store.remote_path(_join(path, file.path)), str(local))

    if kind == "dir":
        target.mkdir(parents=True, exist_ok=True)
    with store.translate_errors(path, "fetched"), ThreadPoolExecutor(_TRANSFERS) as pool:
        list(pool.map(get, files))


# ---- checks ------------------------------------------------------------------------------------


def missing_artifacts(
    artifacts: Sequence[Artifact], stores: StoreSet, *, workers: int = 16
) -> list[tuple[Artifact, str]]:
    """Return the artifacts that are not as they were, each with the reason in words.

    Each is looked up, not read: it has to be there, with the size and the number of files recorded.
    """

    def check(artifact: Artifact) -> str | None:
        return _why_missing(artifact, stores)

    if len(artifacts) < 2 or all(_is_local(artifact, stores) for artifact in artifacts):
        reasons = [check(artifact) for artifact in artifacts]  # threads cost more than a stat does
    else:
        with ThreadPoolExecutor(workers) as pool:
            reasons = list(pool.map(check, artifacts))
    return [
        (artifact, reason)
        for artifact, reason in zip(artifacts, reasons, strict=True)
        if reason is not None
    ]


def _is_local(artifact: Artifact, stores: StoreSet) -> bool:
    try:
        return stores.locate(artifact.uri)[0].is_local
    except DataError:
        return True


def _why_missing(artifact: Artifact, stores: StoreSet) -> str | None:
    try:
        store, path = stores.locate(artifact.uri)
        if store.is_local:
            found = _measure_local(store.local_path(path))
        else:
            files, _ = _list_remote(store, path)
            found = (sum(file.size for file in files), len(files)) if files else None
    except DataError as error:
        return str(error)
    if found is None:
        return f"{artifact.uri} is gone"
    if found != (artifact.size, artifact.files):
        return (
            f"{artifact.uri} has {found[0]} bytes in {found[1]} files, not {artifact.size} in "
            f"{artifact.files}"
        )
    return None


def _measure_local(path: Path) -> tuple[int, int] | None:
    """Return bytes and number of files, or None if nothing is there."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not path.is_dir():
        return status.st_size, 1
    entries = [entry for entry in walk_tree(os.fsencode(path)) if entry.kind != b"d"]
    return sum(entry.stat.st_size for entry in entries if entry.kind == b"f"), len(entries)


def _list_remote(store: Store, path: str) -> tuple[list[_RemoteFile], Literal["dir", "file"]]:
    """Return the files at and below a path of a remote store, sorted; none if nothing is there."""
    filesystem, root = store.filesystem, store.remote_path(path)
    with store.translate_errors(path, "looked up"):
        try:
            info: dict[str, Any] = filesystem.info(root)
            if info["type"] == "file":
                return [_RemoteFile("", int(info["size"]), _find_version(info))], "file"
            found = filesystem.find(root, detail=True)
        except FileNotFoundError:
            return [], "file"
    base = filesystem._strip_protocol(root).rstrip("/")  # noqa: SLF001 - fsspec's own way to a name
    files = [
        _RemoteFile(str(name)[len(base) :].lstrip("/"), int(item["size"]), _find_version(item))
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
