"""Files of this machine sent to a remote store: several at a time, in parts, and digested in passing.

What an earlier try has sent is not sent again: the store itself says which objects, and which parts of an unfinished
object, it has, and by which MD5. So nothing has to be remembered here, and nothing is believed.
"""

from __future__ import annotations

import hashlib
import mimetypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlpipelines.exceptions import DataError, StoreError
from airflow_mlpipelines.storage.listing import RemoteFile, list_remote
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from airflow_mlpipelines.storage.stores import Store


class _Sent(NamedTuple):
    """A part that the server has: its etag, which is the MD5 of its bytes unless a key of the customer's encrypts it."""

    etag: str
    size: int


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
    etag = _plain_etag(known)
    if etag is None or known.size != size:
        return False
    if "-" not in etag:
        with file.open("rb") as opened:
            return etag == hashlib.file_digest(opened, _md5).hexdigest()
    return etag == _etag_in_parts(file, cut(size, part_size(size)))


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
        self._begun: list[_LargeFile] = []
        # Whatever way S3's objects go: through a proxy, with a key of the customer's, by nobody in particular.
        self._in_parts = store.protocol.name == "S3"
        self._objects = find_objects(store)
        self._stop = threading.Event()
        self._digests: dict[str, bytes] = {}

    def run(self, files: Mapping[str, Path]) -> dict[str, bytes]:
        largest = max(file.stat().st_size for file in files.values())
        unfinished: dict[str, list[str]] = {}
        if self._alone and self._in_parts and largest > PART:
            unfinished = _list_unfinished(self._store, self._store.remote_path(self._path))
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
            sending = _LargeFile(self._store, remote, file, parts, self._stop)
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
        before, digests = _version(file), OrderedDigest(self._stop)

        def send(part: Part) -> None:
            data = _read_local(file, part)
            blob.write(part, data)
            if digests.add(part.number, data) == len(parts):
                _check_unchanged(file, before)
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

        data = _read_local(file, Part(0, 0, file.stat().st_size))
        known = self._present.get(name)
        if known is None or not _is_same(known, data):
            self._write(remote, data, _guess_type(name))
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

    def _send_part(self, name: str, sending: _LargeFile, part: Part) -> None:
        data = _read_local(sending.file, part)
        etag = sending.find(part, data) or sending.send(part, data)
        digest = sending.finish(part, data, etag)
        if digest is not None:
            self._digests[name] = digest


class _LargeFile:
    """A file that is sent as a multi-part upload, which may have been begun before."""

    def __init__(
        self, store: Store, remote: str, file: Path, parts: Sequence[Part], stop: threading.Event
    ) -> None:
        self.remote = remote
        self.file = file
        self._filesystem: Any = store.filesystem
        self._bucket, _, self._key = remote.partition("/")
        self._parts = parts
        self._before = _version(file)
        self._digest = OrderedDigest(stop)
        self._etags: dict[int, str] = {}
        self._sent: dict[int, _Sent] = {}
        self._begun: Sequence[str] = ()
        self._upload_id = ""
        self._completed = False

    def is_there(self, known: RemoteFile) -> bool:
        """Whether an object is what this file would be, sent in these parts."""
        etag = _plain_etag(known)
        if etag is None or not etag.endswith(f"-{len(self._parts)}"):
            return False
        return etag == _etag_in_parts(self.file, self._parts)

    def begin(self, begun: Sequence[str]) -> None:
        """Go on with the newest of the uploads that were begun, or begin one."""
        self._begun = begun
        for upload_id in reversed(begun):
            with suppress(Exception):  # whatever is wrong with it, another one can be begun
                self._sent = self._list_parts(upload_id)
                self._upload_id = upload_id
                return
        kind = _guess_type(self._key)
        made = self._call("create_multipart_upload", **({"ContentType": kind} if kind else {}))
        self._upload_id = made["UploadId"]

    def abandon(self) -> None:
        """Let the server forget what was sent of it, unless it is there whole."""
        if not self._completed:
            with suppress(Exception):  # the error that brought us here is the one to tell
                self._call("abort_multipart_upload", UploadId=self._upload_id)

    def _list_parts(self, upload_id: str) -> dict[int, _Sent]:
        found: dict[int, _Sent] = {}
        marker = 0
        while True:
            page = self._call("list_parts", UploadId=upload_id, PartNumberMarker=marker)
            for item in page.get("Parts", []):
                found[item["PartNumber"]] = _Sent(item["ETag"], item["Size"])
            if not page.get("IsTruncated"):
                return found
            marker = page["NextPartNumberMarker"]

    def find(self, part: Part, data: bytes) -> str | None:
        """Return the etag of the part if the server has it with these bytes."""
        sent = self._sent.get(part.number + 1)
        if sent is None or sent.size != part.size or not _is_md5(sent.etag, data):
            return None
        return sent.etag

    def send(self, part: Part, data: bytes) -> str:
        """Send a part and return its etag."""
        numbered = {"PartNumber": part.number + 1, "UploadId": self._upload_id}
        return str(self._call("upload_part", Body=data, **numbered)["ETag"])

    def finish(self, part: Part, data: bytes, etag: str) -> bytes | None:
        """Take note of a part; with the last one, complete the object and return the file's digest."""
        self._etags[part.number + 1] = etag
        if self._digest.add(part.number, data) < len(self._parts):
            return None
        _check_unchanged(self.file, self._before)
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in sorted(self._etags.items())]
        self._call(
            "complete_multipart_upload",
            UploadId=self._upload_id,
            MultipartUpload={"Parts": parts},
        )
        self._completed = True
        for upload_id in self._begun:
            if upload_id != self._upload_id:
                with suppress(Exception):  # the object is there; what is left over costs only room
                    self._call("abort_multipart_upload", UploadId=upload_id)
        return self._digest.digest()

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._filesystem.call_s3(
            method, Bucket=self._bucket, Key=self._key, **arguments
        )
        return answer


def _list_unfinished(store: Store, place: str) -> dict[str, list[str]]:
    """Return the ids of the uploads that were begun at and below a place, by key, the oldest first."""
    filesystem: Any = store.filesystem
    bucket, _, prefix = place.partition("/")
    found: dict[str, list[tuple[str, str]]] = {}
    marker: dict[str, str] = {}
    with suppress(Exception):  # not every user may list them, and not every server can
        while True:
            page = filesystem.call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker
            )
            for item in page.get("Uploads", []):
                begun = str(item.get("Initiated", "")), item["UploadId"]
                found.setdefault(item["Key"], []).append(begun)
            if not page.get("IsTruncated"):
                break
            marker = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }
    return {key: [upload_id for _, upload_id in sorted(ids)] for key, ids in found.items()}


def _read_local(file: Path, part: Part) -> bytes:
    with open(file, "rb", buffering=0) as opened:  # noqa: PTH123 - thousands of them
        data = os.pread(opened.fileno(), part.size, part.start) if part.size else b""
        grown = part.size and os.fstat(opened.fileno()).st_size < part.start + part.size
    if len(data) != part.size or grown:
        raise DataError(
            f"{str(file)!r} changes while it is read. Whoever writes it has to end first."
        )
    return data


def _check_unchanged(file: Path, before: tuple[int, int, int]) -> None:
    if _version(file) != before:
        raise DataError(
            f"{str(file)!r} changes while it is read. Whoever writes it has to end first."
        )


def _version(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _plain_etag(file: RemoteFile) -> str | None:
    kind, _, value = (file.version or "").partition("=")
    return value.strip('"') if kind.lower() == "etag" else None


def _is_same(file: RemoteFile, data: bytes) -> bool:
    etag = _plain_etag(file)
    return etag is not None and file.size == len(data) and _is_md5(etag, data)


def _etag_in_parts(file: Path, parts: Sequence[Part]) -> str:
    """Return the etag that S3 gives a file which was sent in these parts."""

    def take(part: Part) -> bytes:
        return bytes(_md5(_read_local(file, part)).digest())

    with ThreadPoolExecutor(THREADS) as pool:
        sums = b"".join(pool.map(take, parts))
    return f"{_md5(sums).hexdigest()}-{len(parts)}"


_md5 = partial(hashlib.md5, usedforsecurity=False)


def _is_md5(etag: str, data: bytes) -> bool:
    return etag.strip('"') == _md5(data).hexdigest()


def _guess_type(name: str) -> str | None:
    return mimetypes.guess_type(name)[0]


def _join(path: str, name: str) -> str:
    return "/".join(part for part in (path, name) if part)
