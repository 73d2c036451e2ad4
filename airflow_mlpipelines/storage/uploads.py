"""Files that a step leaves at a place which others know, and may write to: a ``DataReference`` in mode ``upload``."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from airflow_mlpipelines._naming import list_options
from airflow_mlpipelines.exceptions import DataError, StoreError
from airflow_mlpipelines.storage.ends import CHUNK, open_end
from airflow_mlpipelines.storage.listing import list_remote
from airflow_mlpipelines.storage.stores import part_beside
from airflow_mlpipelines.storage.transfer import pin_external
from airflow_mlpipelines.storage.trees import digest_file, walk_tree
from airflow_mlpipelines.storage.upload import has_content, upload

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.stores import Store
    from airflow_mlpipelines.storage.upload_notes import UploadNote


def upload_files(
    store: Store,
    path: str,
    source: Path,
    *,
    overwrite: bool,
    step_run: str,
    note: UploadNote | None = None,
) -> Artifact:
    """Return what is at the place, once a step's files are there. Other files there are left alone.

    Each file becomes visible when it is whole. The artifact is known by what the store tells of the place: whoever
    writes there makes it another one.

    Args:
        store: The datastore of the place.
        path: The place: a directory.
        source: The directory of the files.
        overwrite: Whether files there of the same names are replaced. Else those with other bytes are an
            error, and nothing is sent.
        step_run: The id of the step run.
        note: What earlier tries have sent, whose files are replaced anyway; what this one sends is added.

    Raises:
        DataError: There are no files, the place has files of these names, or they can't be sent.
    """
    files = check_upload(store, path, source, overwrite=overwrite, note=note)
    if files and note is not None and not overwrite:
        note.add(files)
    if store.is_local:
        with store.translate_errors(path, "written"):
            for name, file in files.items():
                _put(file, store.local_path(path) / name)
    elif files:
        upload(store, path, files, alone=False)
    found = pin_external(store, path, how="version")
    if found is None:
        raise StoreError(f"did not arrive at {store.uri(path)}.")
    return replace(found, version=found.digest, step_run=step_run)


def check_upload(
    store: Store, path: str, source: Path, *, overwrite: bool, note: UploadNote | None = None
) -> dict[str, Path]:
    """Return where each file to send is, by its path below the directory, if all of them may go to the place.

    Without ``overwrite``, those that are there already, with the same bytes, are not among them; and those with other
    bytes are in the way, unless an earlier try has sent them.

    Raises:
        DataError: There are no files, or the place has files of these names with other bytes; these errors are
            not retryable, as another run of the program would end in them too.
    """
    if not source.is_dir():
        raise DataError("the directory that the program was given is gone.")
    files = _list_files(source)
    if not files:
        raise DataError(
            "no file was written to it, so there is nothing to upload. The program has to write files into "
            "the directory that it is given.",
            retryable=False,
        )
    if overwrite:
        return files
    there = _find_there(store, path, files)
    differing = [name for name, is_same in there.items() if not is_same]

    def is_ours(name: str) -> bool:
        return note is not None and note.has_sent(name, partial(_digest_there, store, path, name))

    taken = [name for name in differing if not is_ours(name)]
    if taken:
        raise DataError(
            f"{store.uri(path)} holds {list_options(taken)} already, with other content. Nothing was sent. "
            "Choose another path_on_datastore, or say overwrite=True to replace them.",
            retryable=False,
        )
    return {name: file for name, file in files.items() if not there.get(name)}


def _list_files(source: Path) -> dict[str, Path]:
    """Return where each file is, by its path below the directory; those behind links in it too."""
    files = {}
    for entry in walk_tree(os.fsencode(source)):
        name = os.fsdecode(entry.path)
        if entry.kind == b"l" and (source / name).is_dir():
            raise DataError(
                f"holds {name!r}, a symbolic link to a directory, which can't be uploaded. Write a copy of what "
                "it leads to."
            )
        if entry.kind != b"d":
            files[name] = source / name
    return dict(sorted(files.items()))


def _find_there(store: Store, path: str, files: Mapping[str, Path]) -> dict[str, bool]:
    """Return the names that are at the place, and whether they have the bytes of our files."""
    if store.is_local:
        root = store.local_path(path)
        return {
            name: _is_same(file, root / name)
            for name, file in files.items()
            if os.path.lexists(root / name)
        }
    there = {file.path: file for file in list_remote(store, path)[0]}
    return {
        name: _is_same_remote(file, store, path, there[name])
        for name, file in files.items()
        if name in there
    }


def _digest_there(store: Store, path: str, name: str) -> str:
    """Return the digest (64 hex digits) of a file at the place, or nothing if it is none by now."""
    from blake3 import blake3

    end = open_end(store, path)
    hasher = blake3()
    try:
        with store.translate_errors(end.below(name), "read"), end.read(name) as opened:
            while data := opened.read(CHUNK):
                hasher.update(data)
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError | IsADirectoryError):
            return ""
        raise
    return hasher.hexdigest()


def _is_same_remote(ours: Path, store: Store, path: str, theirs: RemoteFile) -> bool:
    if ours.stat().st_size != theirs.size:
        return False
    if has_content(theirs, ours):
        return True
    place = open_end(store, path)
    with (
        store.translate_errors(place.below(theirs.path), "read"),
        place.read(theirs.path) as remote,
        ours.open("rb") as local,
    ):
        while data := local.read(CHUNK):
            if _read_whole(remote, len(data)) != data:
                return False
    return True


def _read_whole(file: IO[bytes], size: int) -> bytes:
    """Return so many bytes, or all that there are: some drivers' files give less at a time."""
    pieces = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _is_same(ours: Path, theirs: Path) -> bool:
    if not theirs.is_file() or ours.stat().st_size != theirs.stat().st_size:
        return False
    return digest_file(os.fsencode(ours)) == digest_file(os.fsencode(theirs))


def _put(file: Path, target: Path) -> None:
    """Copy a file to where it is visible when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(part_beside(str(target)))
    try:
        shutil.copyfile(file, part)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
