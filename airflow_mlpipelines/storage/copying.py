"""Transfers: a file or a directory from one datastore to another, through this machine only if it must.

Each file becomes visible when it is whole. Its digest is taken while it passes; where the store copies by
itself, from what the store told of bytes that were read before, or by reading what has arrived.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import DIGEST_PREFIX
from airflow_mlpipelines._units import show_duration, show_size
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.ends import CHUNK, RemoteEnd
from airflow_mlpipelines.storage.listing import VERSION_PREFIX, digest_versions, name_version
from airflow_mlpipelines.storage.stores import PART_SUFFIX
from airflow_mlpipelines.storage.transfer import pin_external
from airflow_mlpipelines.storage.trees import TreeDigest, combine_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.ends import End, Listing
    from airflow_mlpipelines.storage.journal import Journal
    from airflow_mlpipelines.storage.listing import RemoteFile

_FILES_AT_ONCE = 8
_REPORT_SECONDS = 5.0
_SAVE_SECONDS = 20.0


class StoppedError(DataError):
    """The transfer was told to stop."""


class _Progress:
    """How far a transfer is; many threads count."""

    def __init__(self, files: int, size: int) -> None:
        self._files, self._size = files, size
        self._lock = threading.Lock()
        self._started = self._reported = time.monotonic()
        self.done = self.passed = 0

    def add(self, *, files: int = 0, size: int = 0) -> None:
        with self._lock:
            self.done += files
            self.passed += size

    def describe(self) -> str:
        rate = self.passed / max(time.monotonic() - self._started, 1e-3)
        return (
            f"{self.done} of {self._files} files, {show_size(self.passed)} of "
            f"{show_size(self._size)}, {show_size(rate)}/s"
        )

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS:
            return False
        self._reported = now
        return True


@dataclass(frozen=True)
class Transfer:
    """One transfer, ready to run.

    Attributes:
        artifact: What the source is, as the run found it.
        source: Where it is.
        target: Where it goes.
        journal: What earlier tries brought there.
        blobs: Knows the digests of data that this machine has read before.
        emit: Takes lines for the log.
        stop: Ends the transfer when it is set.
        replace: Whether files at the target that the source lacks are deleted; else they are an error.
    """

    artifact: Artifact
    source: End
    target: End
    journal: Journal
    blobs: BlobCache
    emit: Callable[[str], None]
    stop: threading.Event
    replace: bool = False

    def run(self) -> TreeDigest:
        """Return what has arrived, once all of it has.

        Raises:
            DataError: The source is gone or was changed, the target can't take it, or something did not
                arrive as it was. What has arrived is noted for the next try.
        """
        self.journal.load()
        listing = self.source.list()
        if listing.kind is None:
            raise DataError(f"{self.source.uri} is gone. Run the step that makes it once more.")
        relied = bool(self.journal.entries)
        result = self._verify(listing, *self._bring(listing))
        if result is None and relied:
            self.emit("What is there is not what the source was: all of it is sent anew.")
            self.journal.entries.clear()
            result = self._verify(listing, *self._bring(listing))
        if result is None:
            raise DataError(
                f"{self.source.uri} was changed after this run had looked it up, or did not arrive as it "
                "was. Start a new run, which takes it as it is now."
            )
        return result

    # ---- bringing --------------------------------------------------------------------------

    def _bring(self, listing: Listing) -> tuple[Listing, dict[str, str]]:
        """Bring all files to the target; return what is there then, and the digests that are known."""
        before = self.target.list()
        self._check_target(listing, before)
        digests: dict[str, str] = {}
        for name, file in listing.files.items():
            known = self.journal.find(file, before.files.get(name))
            if known is not None and (known or self._on_server):
                digests[name] = known
        needed = [file for name, file in listing.files.items() if name not in digests]
        how = "copied by the store itself" if self._on_server else "streamed"
        self.emit(
            f"{self.source.uri} -> {self.target.uri}: {len(listing.files)} files, "
            f"{show_size(listing.size)}; {len(digests)} are there already, {len(needed)} are {how}"
        )
        self.target.make_others(listing)
        started = time.monotonic()
        try:
            self._send_all(listing, needed, digests)
        finally:
            found = self._note(listing, digests)
        for name in sorted(found.files.keys() - listing.files.keys()):
            self.target.delete(name)
        self.emit(f"{len(needed)} files sent in {show_duration(time.monotonic() - started)}")
        return found, digests

    def _check_target(self, listing: Listing, before: Listing) -> None:
        if before.kind not in (None, listing.kind) and before.files:
            raise DataError(
                f"{self.target.uri} is a {_word(before.kind)} already, and the source is a "
                f"{_word(listing.kind)}. Choose another destination."
            )
        extra = sorted(
            name for name in before.files.keys() - listing.files.keys() if not _is_part(name)
        )
        if extra and not self.replace:
            raise DataError(
                f"{self.target.uri} holds {len(extra)} files that the source lacks, such as "
                f"{extra[0]!r}. Choose an empty destination, or DataReference(..., overwrite=True) to "
                "have them deleted."
            )

    def _send_all(
        self, listing: Listing, files: Sequence[RemoteFile], digests: dict[str, str]
    ) -> None:
        progress = _Progress(len(files), sum(file.size for file in files))
        saved = time.monotonic()
        send = self._copy if self._on_server else self._stream
        failed = threading.Event()

        def bring(file: RemoteFile) -> None:
            if failed.is_set():
                return
            try:
                digests[file.path] = send(file, progress, failed)
            except BaseException:
                failed.set()
                raise
            progress.add(files=1)

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            pending = {pool.submit(bring, file) for file in files}
            try:
                while pending:
                    done, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if progress.is_due():
                        self.emit(progress.describe())
                    if pending and time.monotonic() - saved > _SAVE_SECONDS:
                        self._note(listing, dict(digests))
                        saved = time.monotonic()
            except BaseException:
                failed.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _stream(self, file: RemoteFile, progress: _Progress, failed: threading.Event) -> str:
        """Send one file through this machine; return its digest as 64 hex digits."""
        from blake3 import blake3

        hasher, size = blake3(), 0
        with (
            self.source.store.translate_errors(self.source.below(file.path), "read"),
            self.source.read(file.path) as reader,
            self.target.store.translate_errors(self.target.below(file.path), "written"),
            self.target.write(file.path, file.size) as writer,
        ):
            while chunk := reader.read(CHUNK):
                if self.stop.is_set() or failed.is_set():
                    raise StoppedError("The transfer was stopped.")
                hasher.update(chunk)
                writer.write(chunk)
                size += len(chunk)
                progress.add(size=len(chunk))
            if size != file.size:
                raise DataError(
                    f"{self.source.store.uri(self.source.below(file.path))} had {file.size} bytes, and "
                    f"{size} when it was read: somebody writes it."
                )
        return hasher.hexdigest()

    def _copy(self, file: RemoteFile, progress: _Progress, failed: threading.Event) -> str:
        """Let the store copy one file; return no digest."""
        if self.stop.is_set() or failed.is_set():
            raise StoppedError("The transfer was stopped.")
        source = self.source.store.remote_path(self.source.below(file.path))
        target = self.target.store.remote_path(self.target.below(file.path))
        with self.target.store.translate_errors(self.target.below(file.path), "written"):
            self.target.store.filesystem.cp_file(source, target)
        progress.add(size=file.size)
        return ""

    @property
    def _on_server(self) -> bool:
        """Whether both ends are of one store, seen with the same credentials, that copies by itself."""
        if not (isinstance(self.source, RemoteEnd) and isinstance(self.target, RemoteEnd)):
            return False
        ours, theirs = self.source.store, self.target.store
        return ours.protocol.copies and bool(ours.filesystem == theirs.filesystem)

    def _note(self, listing: Listing, digests: dict[str, str]) -> Listing:
        """Note in the journal what is at the target now, and return it."""
        found = self.target.list()
        for name, content in digests.items():
            if name in listing.files:
                self.journal.note(listing.files[name], found.files.get(name), content)
        self.journal.save()
        return found

    # ---- verifying -------------------------------------------------------------------------

    def _verify(
        self, listing: Listing, found: Listing, digests: dict[str, str]
    ) -> TreeDigest | None:
        """Return what has arrived; None if that is not what the source was when the run began."""
        for name, file in listing.files.items():
            there = found.files.get(name)
            if there is None or there.size != file.size:
                said = f"has {there.size} bytes" if there else "is not there under its name"
                raise DataError(
                    f"{self.target.store.uri(self.target.below(name))} {said}, not {file.size} bytes"
                )
        pinned = self.artifact.digest
        if pinned.startswith(VERSION_PREFIX):
            now = pin_external(self.source.store, self.source.path, how="version")
            if now is None or now.digest != pinned:
                return None
        digest = self._digest(listing, found, digests)
        if pinned.startswith(DIGEST_PREFIX) and digest != pinned:
            return None
        links = sum(kind == b"l" for _, kind, _ in listing.others)
        kind = "file" if listing.kind == "file" else "dir"
        return TreeDigest(digest, listing.size, len(listing.files) + links, kind)  # type: ignore[arg-type]

    def _digest(self, listing: Listing, found: Listing, digests: dict[str, str]) -> str:
        if all(digests.values()):
            return _combine(listing, digests)
        source, files = self.source, list(listing.files.values())
        version = name_version(source.store, source.path, files)
        now = name_version(source.store, source.path, list(source.list().files.values()))
        known = self.blobs.content_of(version) if version is not None and version == now else None
        if known is not None:
            return known
        if self.artifact.digest.startswith(VERSION_PREFIX):
            return digest_versions(self.target.store, self.target.path, list(found.files.values()))
        self.emit("Reading what has arrived: its digest is not known by the store's version of it")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            read = dict(zip(listing.files, pool.map(self._read_back, listing.files), strict=True))
        return _combine(listing, read)

    def _read_back(self, name: str) -> str:
        from blake3 import blake3

        hasher = blake3()
        with (
            self.target.store.translate_errors(self.target.below(name), "read"),
            self.target.read(name) as reader,
        ):
            while chunk := reader.read(CHUNK):
                if self.stop.is_set():
                    raise StoppedError("The transfer was stopped.")
                hasher.update(chunk)
        return hasher.hexdigest()


def _combine(listing: Listing, digests: dict[str, str]) -> str:
    """Return the digest of a file or a directory from those of its files."""
    return combine_files(
        {name: bytes.fromhex(content) for name, content in digests.items()}, listing.others
    )


def _is_part(name: str) -> bool:
    return name.endswith(PART_SUFFIX)


def _word(kind: str | None) -> str:
    return "directory" if kind == "dir" else "file"
