"""Snapshots: the content-addressed copy of a step's source directory.

What counts as source is what ``.amlignore`` (else ``.gitignore``) of the directory does not exclude.
Version control, caches and virtual environments never count.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from airflow_mlpipelines import settings
from airflow_mlpipelines._digest import digest, digest_bytes
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathspec import GitIgnoreSpec

    from airflow_mlpipelines.storage.stores import Store

MAX_BYTES = 300 * 1024 * 1024
_IGNORE_FILES = (".amlignore", ".gitignore")  # the first that exists counts, as in Azure ML
_NEVER = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        ".venv",
        ".ipynb_checkpoints",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".tox",
        "node_modules",
        ".DS_Store",
    }
)
_NEVER_SUFFIXES = (".pyc", ".pyo", ".swp")
_EXECUTABLE, _PLAIN = 0o755, 0o644
_SHOWN_FILES = 3


@dataclass(frozen=True)
class Snapshot:
    """What identifies a stored source directory.

    Attributes:
        digest: 64 hex digits over names, contents and executable bits.
        size: Bytes in all.
    """

    digest: str
    files: int
    size: int


def list_source_files(directory: Path) -> list[str]:
    """Return the files of a source directory, relative, with ``/``, sorted.

    Raises:
        DataError: The directory is not there or can't be listed.
    """
    if not directory.is_dir():
        raise DataError(f"source directory {directory} is not there")
    ignored = _load_ignore_file(directory)
    found: list[str] = []
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            with os.scandir(directory / parent) as members:
                entries = list(members)
        except OSError as error:
            raise DataError(f"{directory / parent} can't be listed: {error.strerror}") from error
        for entry in entries:
            name = f"{parent}/{entry.name}" if parent else entry.name
            if entry.name in _NEVER or entry.name.endswith(_NEVER_SUFFIXES):
                continue
            is_directory = entry.is_dir(follow_symlinks=False)
            if ignored is not None and ignored.match_file(f"{name}/" if is_directory else name):
                continue
            if is_directory:
                pending.append(name)
            elif entry.is_file():
                found.append(name)
    return sorted(found)


def _load_ignore_file(directory: Path) -> GitIgnoreSpec | None:
    for name in _IGNORE_FILES:
        file = directory / name
        if file.is_file():
            from pathspec import GitIgnoreSpec

            return GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8").splitlines())
    return None


def make_snapshot(directory: Path, store: Store, files: Sequence[str] | None = None) -> Snapshot:
    """Return the snapshot of a source directory, stored under its digest if it is not there yet.

    Args:
        directory: The source directory.
        store: Where snapshots are kept.
        files: What :func:`list_source_files` returned, if the caller has it.

    Raises:
        DataError: It can't be read or stored, or is larger than 300 MB.
    """
    contents = _read_files(directory, list_source_files(directory) if files is None else files)
    listing = {name: [mode, digest_bytes(data)] for name, (mode, data) in contents.items()}
    identity = digest("snapshot-v1", listing)
    path = _path_of(identity)
    if not store.exists(path):
        store.write_bytes(path, _archive(contents))
    return Snapshot(identity, len(contents), sum(len(data) for _, data in contents.values()))


def _read_files(directory: Path, files: Sequence[str]) -> dict[str, tuple[int, bytes]]:
    contents = {}
    total = 0
    for name in files:
        file = directory / name
        try:
            status = file.stat()
            total += status.st_size
            if total > MAX_BYTES:
                raise DataError(_too_large(directory, files))
            mode = _EXECUTABLE if status.st_mode & 0o100 else _PLAIN
            contents[name] = (mode, file.read_bytes())
        except OSError as error:
            raise DataError(f"source file {file} can't be read: {error.strerror}") from error
    return contents


def _too_large(directory: Path, files: Sequence[str]) -> str:
    sizes = sorted(((directory / name).stat().st_size, name) for name in files)
    largest = ", ".join(
        f"{name} ({size >> 20} MB)" for size, name in sizes[: -_SHOWN_FILES - 1 : -1]
    )
    return (
        f"source directory {directory} holds over {MAX_BYTES >> 20} MB; the largest files are {largest}. "
        "Name what is no code in an .amlignore file there, and pass data as a DataReference."
    )


def _archive(contents: dict[str, tuple[int, bytes]]) -> bytes:
    """Return a tar.gz whose bytes depend on nothing but names, contents and executable bits."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, (mode, data) in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _path_of(identity: str) -> str:
    return f"snapshots/{identity[:2]}/{identity}.tar.gz"


def unpack_snapshot(identity: str, store: Store, target: Path) -> None:
    """Put the files of a snapshot into ``target``, a directory that is not there yet.

    The unpacked files are kept on this machine by digest, so that the next step only copies them.

    Raises:
        DataError: The snapshot is gone, damaged, or holds a member that is no plain file inside.
    """
    kept = settings.home() / "snapshots" / identity
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".incoming-"))
        try:
            extract_archive(store.read_bytes(_path_of(identity)), room)
            room.chmod(0o755)
            try:
                room.rename(kept)
            except OSError:  # another process was quicker
                if not kept.is_dir():
                    raise
        finally:
            shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(kept, target, symlinks=True, copy_function=shutil.copy)


def extract_archive(data: bytes, target: Path) -> None:
    """Extract a tar.gz of plain files into a directory; the one extractor of this package.

    Raises:
        DataError: It is damaged, or a member is a link, a device, absolute, climbs out of the
            directory, or stands there twice; nothing after it is extracted then.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            total = 0
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isreg() or path.is_absolute() or ".." in path.parts:
                    raise DataError(f"archive member {member.name!r} is no plain file inside it")
                total += member.size
                if total > MAX_BYTES:
                    raise DataError(f"archive unpacks to over {MAX_BYTES >> 20} MB")
                place = target / path
                if os.path.lexists(place):
                    raise DataError(f"archive member {member.name!r} stands there twice")
                place.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                place.write_bytes(source.read() if source is not None else b"")
                place.chmod(_EXECUTABLE if member.mode & 0o100 else _PLAIN)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"archive is damaged: {error}") from error
