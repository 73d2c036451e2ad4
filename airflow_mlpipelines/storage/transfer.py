"""Artifacts made, fetched and checked: data between datastores and the worker's disk."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.disk_space import telling_full_disk
from airflow_mlpipelines.storage.download import download
from airflow_mlpipelines.storage.listing import (
    VERSION_PREFIX,
    RemoteFile,
    digest_versions,
    list_remote,
)
from airflow_mlpipelines.storage.pinning import ListedData, digest_content, pin_local
from airflow_mlpipelines.storage.placing import place as place_blob
from airflow_mlpipelines.storage.trees import TreeDigest, combine_files, digest_tree, walk_tree
from airflow_mlpipelines.storage.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.stat_cache import StatCache
    from airflow_mlpipelines.storage.stores import Store, StoreSet

# ---- external data -----------------------------------------------------------------------------


def pin_external(
    store: Store,
    path: str,
    *,
    how: Literal["content", "version"] = "content",
    cache: StatCache | None = None,
    blobs: BlobCache | None = None,
    keep: bool = True,
    emit: Callable[[str], None] | None = None,
) -> Artifact | None:
    """Return what is at ``path`` now, or None if nothing is there.

    Args:
        store: The datastore.
        path: A file or a directory on it.
        how: ``content`` reads the data (or knows them unread from ``cache``); ``version`` believes the
            store: etag or generation, else modification time and size.
        cache: Digests of local files that were read before.
        blobs: Where data read from a remote store are kept, so that the step need not fetch them again. What is
            larger than it may hold, or than this disk has room for, is read and kept nowhere.
        keep: Whether to keep them there: a step that opens them by itself has nothing of it.
        emit: Takes lines for the log, which say how far a remote store has been read.

    Raises:
        DataError: The data can't be read, or the store tells no version.
    """
    if not store.exists(path):
        return None
    if store.is_local:
        return pin_local(store, path, how, cache)
    files, kind = list_remote(store, path)
    size = sum(file.size for file in files)
    if how == "version":
        digest = digest_versions(store, path, files)
    else:
        wanted = ListedData(store, path, files, kind)
        digest = digest_content(wanted, blobs, keep=keep, emit=emit)
    return Artifact(store.uri(path), digest, size, len(files), kind)


# ---- outputs -----------------------------------------------------------------------------------


_NOTES_SUFFIX = ".mlp-sent"
"""Ends the name of the note of what was sent of an output, beside it: a try that goes on does not send that again."""


def commit_output(
    store: Store,
    path: str,
    source: Path,
    *,
    step_run: str,
    expect_directory: bool | None = None,
    cache: StatCache | None = None,
    blobs: BlobCache | None = None,
) -> Artifact:
    """Return the artifact of an output that its step has made, once it is where it stays.

    On a file store nobody may write to its files from then on: steps get them where they are.

    Args:
        store: The datastore that the output goes to.
        path: Where it goes.
        source: What the step made. If that is the place already, nothing is copied.
        step_run: The id of the step run.
        expect_directory: Whether it has to be a directory or a file; None takes either.
        cache: Digests of local files that were read before.
        blobs: Where what was sent to a remote store is kept, so that the steps that read it on this
            machine need not fetch it. The source is gone then.

    Raises:
        DataError: It was not made, is of the wrong kind, or did not arrive as it was.
    """
    if not source.exists():
        raise DataError(
            "was not made. The program has to write it at the path that it is given "
            f"({'a directory, which it makes itself' if expect_directory else 'a file or a directory'})."
        )
    if expect_directory is not None and expect_directory != source.is_dir():
        made, wanted = ("a file", "a directory") if expect_directory else ("a directory", "a file")
        raise DataError(f"is {made}, but was declared as {wanted}.")
    if store.is_local:
        tree = digest_tree(source, cache=cache, seal=True)
        if store.local_path(path) != source:
            _put_in_place(source, store.local_path(path))
    else:
        tree = _send(store, path, source)
        if blobs is not None:
            blobs.adopt(tree.digest, tree.size, source)
    return Artifact(store.uri(path), tree.digest, tree.size, tree.files, tree.kind, None, step_run)


def _put_in_place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError:  # another file system
        shutil.move(str(source), str(target))


def _send(store: Store, path: str, source: Path) -> TreeDigest:
    """Send a file or a directory to a remote store; return what it is."""
    kind: Literal["dir", "file"] = "dir" if source.is_dir() else "file"
    files = _list_members(source) if kind == "dir" else {"": source}
    notes = source.with_name(f".{source.name}{_NOTES_SUFFIX}")
    digests = upload(store, path, files, notes=notes)
    notes.unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in files.values())
    return TreeDigest(combine_files(digests), size, len(files), kind)


def _list_members(source: Path) -> dict[str, Path]:
    """Return where each file of a directory is, by its path below the directory.

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
    names = sorted(os.fsdecode(entry.path) for entry in entries if entry.kind == b"f")
    return {name: source / name for name in names}


# ---- inputs ------------------------------------------------------------------------------------


def fetch(
    artifact: Artifact,
    stores: StoreSet,
    *,
    blobs: BlobCache,
    target: Path,
    link: bool = False,
    held: ExitStack | None = None,
) -> Path:
    """Return where on this machine the artifact's data are.

    Data on a file store are used where they are. Others come through the blob cache to ``target``, as files
    that are read-only and none of the cache's own; what is there already is left as it is, since a program
    of an earlier try may be reading it.

    Args:
        artifact: What is wanted.
        stores: The registered datastores.
        blobs: Data that were fetched before.
        target: Where to put what has to be fetched.
        link: Whether hard links will do: whoever gets ``target`` can't write to its file system.
        held: Keeps what is used in the blob cache until it is closed.

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

    def look_up() -> tuple[list[RemoteFile], Literal["dir", "file"]]:
        files, kind = list_remote(store, path)
        if not files and not store.exists(path):
            raise DataError(f"{artifact.uri} is gone. Run the step that makes it once more.")
        return files, kind

    def bring(made: Path) -> str:
        files, kind = look_up()
        found = download(store, path, files, kind, made)
        if artifact.digest.startswith(VERSION_PREFIX):
            _check_version(artifact, store, path, look_up()[0])
        return found

    if artifact.digest.startswith(VERSION_PREFIX):
        _check_version(artifact, store, path, look_up()[0])

    with ExitStack() as own:
        use = blobs.use(artifact.digest, artifact.size, bring)
        blob = (held or own).enter_context(use)
        target.parent.mkdir(parents=True, exist_ok=True)
        with telling_full_disk(target.parent, artifact.size, limit=blobs.limit):
            place_blob(blob, target, link=link)
    return target


def _check_version(artifact: Artifact, store: Store, path: str, files: list[RemoteFile]) -> None:
    """Raise if the store tells another version than when the data were pinned."""
    if digest_versions(store, path, files) != artifact.digest:
        raise DataError(
            f"{artifact.uri} was changed after this run had looked it up. Start a new run, which takes "
            "it as it is now."
        )


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
            files, _ = list_remote(store, path)
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
    if artifact.version is not None:
        now = pin_external(store, path, how="version")
        if now is None or now.digest != artifact.version:
            return f"{artifact.uri} was written to since"
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
