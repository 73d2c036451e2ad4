"""Files of this machine sent to a remote store: several at a time, in parts, and digested in passing.

What an earlier try has sent is not sent again: the store itself says which objects, and which parts of an unfinished
object, it has, and by which MD5. So nothing has to be remembered here, and nothing is believed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import StoreError
from airflow_mlpipelines.storage.listing import RemoteFile, list_remote
from airflow_mlpipelines.storage.multipart import guess_type, list_unfinished, md5
from airflow_mlpipelines.storage.part_targets import AzureParts
from airflow_mlpipelines.storage.parts import (
    PART,
    THREADS,
    Memory,
    OrderedDigest,
    Part,
    PartsJournal,
    StoppedError,
    carry_all,
    cut,
    part_size,
)
from airflow_mlpipelines.storage.s3_objects import NotServedError, find_objects
from airflow_mlpipelines.storage.trees import digest_file
from airflow_mlpipelines.storage.upload_parts import (
    LargeFile,
    check_unchanged,
    etag_in_parts,
    local_version,
    plain_etag,
    read_local,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from airflow_mlpipelines.storage.stores import Store


def upload(
    store: Store,
    path: str,
    files: Mapping[str, Path],
    *,
    alone: bool = True,
    notes: Path | None = None,
) -> dict[str, bytes]:
    """Return the 32 bytes of each file's digest, once all of them are at ``path``.

    Args:
        store: The datastore.
        path: A place on it.
        files: Where each file is on this machine, by its path below ``path``; ``""`` for a single file.
        alone: Whether the place is its caller's alone. Files there that are none of these, which an earlier try has
            left, are deleted then, and unfinished objects are gone on with. Elsewhere they may be somebody else's,
            who is at it: a large file that broke off is sent anew.
        notes: Where it is noted which files have been sent, and with which bytes, to a store that tells no MD5: what
            is there then, and noted, is not sent again. Only a place that is its caller's alone is trusted so.

    Raises:
        DataError: A file can't be sent, changes meanwhile, or did not arrive.
    """
    with store.translate_errors(path, "written"):
        present = {file.path: file for file in list_remote(store, path)[0]}
        for name in sorted(present.keys() - files.keys()) if alone else ():
            store.filesystem.rm_file(store.remote_path(_join(path, name)))
        with ExitStack() as opened:
            sent = None
            if notes is not None and alone and store.protocol.name != "S3":
                with suppress(OSError):  # then all is sent again after a break
                    sent = opened.enter_context(PartsJournal(notes))
            digests = _Upload(store, path, present, alone=alone, sent=sent).run(files)
    arrived = {file.path: file.size for file in list_remote(store, path)[0]}
    lost = sorted(name for name, file in files.items() if arrived.get(name) != file.stat().st_size)
    if lost or (alone and len(arrived) != len(files)):
        said = f": {lost[0]!r} is not there under its name" if lost and lost[0] else ""
        raise StoreError(f"did not arrive whole at {store.uri(path)}{said}.")
    return digests


def has_content(known: RemoteFile, file: Path) -> bool:
    """Whether a store tells by an MD5 that an object has the bytes of a file of this machine.

    False does not say that it has others: not every store tells an MD5, nor of every object.
    """
    size = file.stat().st_size
    etag = plain_etag(known)
    if etag is None or known.size != size:
        return False
    if "-" not in etag:
        with file.open("rb") as opened:
            return etag == hashlib.file_digest(opened, md5).hexdigest()
    return etag == etag_in_parts(file, cut(size, part_size(size)))


def _is_same(file: RemoteFile, data: bytes) -> bool:
    etag = plain_etag(file)
    return etag is not None and file.size == len(data) and etag == md5(data).hexdigest()


class _Upload:
    def __init__(
        self,
        store: Store,
        path: str,
        present: Mapping[str, RemoteFile],
        *,
        alone: bool,
        sent: PartsJournal | None,
    ) -> None:
        self._store = store
        self._sent = sent
        self._path = path
        self._present = present
        self._alone = alone
        self._begun: list[LargeFile] = []
        # Whatever way S3's objects go: through a proxy, with a key of the customer's, by nobody in particular.
        self._in_parts = store.protocol.name == "S3"
        self._objects = find_objects(store)
        self._stop = threading.Event()
        self._digests: dict[str, bytes] = {}

    def run(self, files: Mapping[str, Path]) -> dict[str, bytes]:
        largest = max(file.stat().st_size for file in files.values())
        unfinished: dict[str, list[str]] = {}
        if self._alone and self._in_parts and largest > PART:
            unfinished = list_unfinished(self._store, self._store.remote_path(self._path))
        # Two at a time also of the largest parts there are, and else as many bytes as threads have parts.
        memory = Memory(max(THREADS * PART, 2 * part_size(largest)), self._stop)
        try:
            carry_all(self._jobs(files, unfinished, memory), stop=self._stop)
        except BaseException:
            if not self._alone:  # nobody would know it again as ours
                for sending in self._begun:
                    sending.abandon()
            raise
        return self._digests

    def _jobs(
        self, files: Mapping[str, Path], unfinished: Mapping[str, Sequence[str]], memory: Memory
    ) -> Iterator[Callable[[], None]]:
        for name, file in files.items():
            if not self._in_parts:
                yield from self._send_elsewhere(name, file, memory)
                continue
            remote = self._store.remote_path(_join(self._path, name))
            size = file.stat().st_size
            parts = cut(size, part_size(size))
            if len(parts) == 1:
                yield memory.lend(size, partial(self._send_small, name, file, remote))
                continue
            sending = LargeFile(self._store, remote, file, parts, self._stop)
            known = self._present.get(name)
            if known is not None and sending.is_there(known):
                self._digests[name] = digest_file(os.fsencode(file))
                continue
            sending.begin(unfinished.get(remote.partition("/")[2], ()))
            self._begun.append(sending)
            for part in parts:
                yield memory.lend(part.size, partial(self._send_part, name, sending, part))

    def _send_elsewhere(
        self, name: str, file: Path, memory: Memory
    ) -> Iterator[Callable[[], None]]:
        """Send a file to another store than S3: as its driver does it, or a large one in Azure's blocks."""
        parts = cut(file.stat().st_size, part_size(file.stat().st_size))
        if self._store.protocol.name != "Azure Blob Storage" or len(parts) == 1:
            yield partial(self._send_whole, name, file)
            return
        digest = self._find_sent(name, file)
        if digest is not None:
            self._digests[name] = digest
            return
        remote = self._store.remote_path(_join(self._path, name))
        blob = AzureParts(self._store, remote, RemoteFile(name, file.stat().st_size, None), parts)
        blob.begin(None)
        before, digests = local_version(file), OrderedDigest(self._stop)

        def send(part: Part) -> None:
            data = read_local(file, part)
            blob.write(part, data)
            if digests.add(part.number, data) == len(parts):
                check_unchanged(file, before)
                blob.finish()
                self._note_sent(name, file, digests.digest())

        for part in parts:
            yield memory.lend(part.size, partial(send, part))

    def _send_whole(self, name: str, file: Path) -> None:
        if (digest := self._find_sent(name, file)) is not None:
            self._digests[name] = digest
            return
        digest = digest_file(os.fsencode(file))
        with self._store.publish(_join(self._path, name)) as place:
            self._store.filesystem.put_file(str(file), place)
        self._note_sent(name, file, digest)

    def _find_sent(self, name: str, file: Path) -> bytes | None:
        """Return the digest of a file that is there, and of which it is noted that these bytes were sent."""
        known, size = self._present.get(name), file.stat().st_size
        if self._sent is None or not self._sent.holds_parts or known is None or known.size != size:
            return None
        digest = digest_file(os.fsencode(file))
        noted = self._sent.has(RemoteFile(name, size, digest.hex()), Part(0, 0, size))
        return digest if noted else None

    def _note_sent(self, name: str, file: Path, digest: bytes) -> None:
        size = file.stat().st_size
        if self._sent is not None:
            self._sent.note(RemoteFile(name, size, digest.hex()), Part(0, 0, size))
        self._digests[name] = digest

    def _send_small(self, name: str, file: Path, remote: str) -> None:
        from blake3 import blake3

        data = read_local(file, Part(0, 0, file.stat().st_size))
        known = self._present.get(name)
        if known is None or not _is_same(known, data):
            self._write(remote, data, guess_type(name))
        self._digests[name] = blake3(data).digest()

    def _write(self, remote: str, data: bytes, kind: str | None) -> None:
        """Write an object of one part."""
        if self._objects is not None:
            try:
                return self._objects.write(remote, data, content_type=kind)
            except NotServedError:
                if self._stop.is_set():
                    raise StoppedError("stopped") from None
        self._store.filesystem.pipe_file(remote, data, **({"ContentType": kind} if kind else {}))
        return None

    def _send_part(self, name: str, sending: LargeFile, part: Part) -> None:
        data = read_local(sending.file, part)
        etag = sending.find(part, data) or sending.send(part, data)
        digest = sending.finish(part, data, etag)
        if digest is not None:
            self._digests[name] = digest


def _join(path: str, name: str) -> str:
    return "/".join(part for part in (path, name) if part)
