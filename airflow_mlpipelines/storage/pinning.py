"""What identifies external data when a run starts, local or remote: their content, or what their store tells."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, NamedTuple

from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.disk_space import FullDiskError
from airflow_mlpipelines.storage.download import download
from airflow_mlpipelines.storage.listing import (
    RemoteFile,
    digest_place,
    list_remote,
    name_version,
)
from airflow_mlpipelines.storage.reading import ReadingProgress, digest_remote
from airflow_mlpipelines.storage.trees import digest_tree, walk_tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.stat_cache import StatCache
    from airflow_mlpipelines.storage.stores import Store


def pin_local(
    store: Store, path: str, how: Literal["content", "version"], cache: StatCache | None
) -> Artifact:
    """Return what is at a path of a file store."""
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
    size = sum(size for size, _ in seen.values())
    return Artifact(store.uri(path), digest_place(store, path, seen), size, len(seen), kind)


class ListedData(NamedTuple):
    """Data of a remote store, as it has just listed them."""

    store: Store
    path: str
    files: list[RemoteFile]
    kind: Literal["dir", "file"]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


def digest_content(
    wanted: ListedData, blobs: BlobCache | None, *, keep: bool, emit: Callable[[str], None] | None
) -> str:
    """Return the content's digest, read once per version where the store tells versions.

    Args:
        wanted: The data.
        blobs: Knows the digests of versions that were read before.
        keep: Whether the data are kept there as well, if they are not too large.
        emit: Takes lines for the log, which say how far it is.
    """
    store, path, files, _ = wanted
    if blobs is None:
        return digest_remote(store, path, files, emit=emit)
    version = name_version(store, path, files)
    known = blobs.content_of(version) if version is not None else None
    if known is not None:
        return known
    if keep and wanted.size <= blobs.limit:
        digest = _keep(wanted, blobs, version, emit)
    else:
        digest = digest_remote(store, path, files, emit=emit)
    # What changed while it was read has the one version before, and the other bytes after.
    if version is not None and name_version(store, path, list_remote(store, path)[0]) == version:
        blobs.note_content(version, digest)
    return digest


def _keep(
    wanted: ListedData, blobs: BlobCache, version: str | None, emit: Callable[[str], None] | None
) -> str:
    """Return the digest of data that are kept for their steps, if the disk has room for them."""
    store, path, files, kind = wanted

    def bring(made: Path) -> str:
        progress = ReadingProgress(store.uri(path), wanted.size, emit)
        return download(store, path, files, kind, made, progress=progress)

    try:
        return blobs.add(wanted.size, bring, name=version)
    except FullDiskError as error:
        if emit is not None:
            emit(f"{store.uri(path)} is read and not kept for its steps: {error}")
        return digest_remote(store, path, files, emit=emit)
