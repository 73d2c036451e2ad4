"""Transfers: a file or a directory from one datastore to another, through this machine only if it must.

Each file becomes visible when it is whole. Its digest is taken while it passes; where the store copies by
itself, from what the store told of bytes that were read before, or by reading what has arrived.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import DIGEST_PREFIX
from airflow_mlpipelines._units import show_duration, show_size
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.ends import CHUNK
from airflow_mlpipelines.storage.listing import VERSION_PREFIX, digest_versions, name_version
from airflow_mlpipelines.storage.parts import PART, THREADS, StoppedError, carry_all, part_size
from airflow_mlpipelines.storage.progress import Progress
from airflow_mlpipelines.storage.sending import Sender
from airflow_mlpipelines.storage.server_copies import copies_by_itself, has_other_bytes
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

_LOOK_SECONDS = 1.0
_SAVE_SECONDS = 20.0


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
        relied = not self.journal.is_empty
        result = self._verify(listing, *self._bring(listing))
        if result is None and relied:
            self.emit("What is there is not what the source was: all of it is sent anew.")
            self.journal.clear()
            result = self._verify(listing, *self._bring(listing))
        if result is None:
            raise DataError(
                f"{self.source.uri} was changed after this run had looked it up, or did not arrive as it "
                "was. Start a new run, which takes it as it is now.",
                retryable=not self._has_other_version(),
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
            if known is not None:
                digests[name] = known
        needed = [file for name, file in listing.files.items() if name not in digests]
        how = "copied by the store itself" if self._on_server else "sent"
        self.emit(
            f"{self.source.uri} -> {self.target.uri}: {len(listing.files)} files, "
            f"{show_size(listing.size)}; {len(digests)} are there already, {len(needed)} are {how}"
        )
        self.target.make_others(listing)
        started = time.monotonic()
        try:
            self._send_all(listing, needed, digests)
        except BaseException:
            with suppress(DataError):  # the error that brought us here is the one to tell
                self._note(listing, digests)
            raise
        found = self._note(listing, digests)
        for name in sorted(found.files.keys() - listing.files.keys()):
            self.target.delete(name)
        self.emit(f"{len(needed)} files sent in {show_duration(time.monotonic() - started)}")
        return found, digests

    def _check_target(self, listing: Listing, before: Listing) -> None:
        if before.kind not in (None, listing.kind) and before.files:
            raise DataError(
                f"{self.target.uri} is a {_word(before.kind)} already, and the source is a "
                f"{_word(listing.kind)}. Choose another destination.",
                retryable=False,
            )
        extra = sorted(
            name for name in before.files.keys() - listing.files.keys() if not _is_part(name)
        )
        if extra and not self.replace:
            raise DataError(
                f"{self.target.uri} holds {len(extra)} files that the source lacks, such as "
                f"{extra[0]!r}. Choose an empty destination, or DataReference(..., overwrite=True) to "
                "have them deleted.",
                retryable=False,
            )

    def _send_all(
        self, listing: Listing, files: Sequence[RemoteFile], digests: dict[str, str]
    ) -> None:
        """Send files, while the log is told how far it is and the journal what has come."""
        progress = Progress(len(files), sum(file.size for file in files))
        failed = threading.Event()
        saved = time.monotonic()
        largest = max((file.size for file in files), default=0)
        threads = max(1, min(THREADS, THREADS * PART // part_size(largest)))
        with (
            Sender(self.source, self.target, self.journal, progress, self.stop, failed) as sender,
            ThreadPoolExecutor(1) as pool,
        ):
            jobs = sender.jobs(files, digests, on_server=self._on_server)
            sending = pool.submit(carry_all, jobs, threads=threads, stop=failed)
            try:
                while not wait([sending], timeout=_LOOK_SECONDS).done:
                    if progress.is_due():
                        self.emit(progress.describe())
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        self._note(listing, dict(digests))
                        saved = time.monotonic()
            except BaseException:
                failed.set()
                raise
            if progress.is_due():
                self.emit(progress.describe())
            try:
                sending.result()
            except StoppedError:
                raise StoppedError("The transfer was stopped.") from None

    @property
    def _on_server(self) -> bool:
        return copies_by_itself(self.source, self.target)

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
            if not digests[name] and has_other_bytes(self.source, self.target, file, there):
                return None
        if self._has_other_version():
            return None
        pinned = self.artifact.digest
        digest = self._digest(listing, found, digests)
        if pinned.startswith(DIGEST_PREFIX) and digest != pinned:
            return None
        links = sum(kind == b"l" for _, kind, _ in listing.others)
        kind = "file" if listing.kind == "file" else "dir"
        return TreeDigest(digest, listing.size, len(listing.files) + links, kind)  # type: ignore[arg-type]

    def _has_other_version(self) -> bool:
        """Whether the source, if it is known by its version, is not what it was when the run began."""
        pinned = self.artifact.digest
        if not pinned.startswith(VERSION_PREFIX):
            return False
        now = pin_external(self.source.store, self.source.path, how="version")
        return now is None or now.digest != pinned

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
        unread = [file for name, file in listing.files.items() if not digests[name]]
        self.emit(
            f"Reading {len(unread)} files that have arrived: the store's version of them tells no digest"
        )
        progress = Progress(len(unread), sum(file.size for file in unread))
        with ThreadPoolExecutor(THREADS) as pool:
            reading = {file.path: pool.submit(self._read_back, file, progress) for file in unread}
            pending: set[Future[str]] = set(reading.values())
            while pending:
                done, pending = wait(pending, timeout=_LOOK_SECONDS, return_when=FIRST_EXCEPTION)
                if progress.is_due():
                    self.emit(f"{progress.describe()} read")
                if any(future.exception() is not None for future in done):
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
        return _combine(
            listing, {**digests, **{name: future.result() for name, future in reading.items()}}
        )

    def _read_back(self, file: RemoteFile, progress: Progress) -> str:
        from blake3 import blake3

        hasher = blake3()
        with (
            self.target.store.translate_errors(self.target.below(file.path), "read"),
            self.target.read(file.path) as reader,
        ):
            while chunk := reader.read(CHUNK):
                if self.stop.is_set():
                    raise StoppedError("The transfer was stopped.")
                hasher.update(chunk)
                progress.add(size=len(chunk))
        progress.add(files=1)
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
