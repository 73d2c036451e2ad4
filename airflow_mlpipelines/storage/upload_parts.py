"""Large files of this machine that are sent to S3 in parts, and what tells whether an object has a file's bytes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.multipart import S3Upload, SentPart, md5
from airflow_mlpipelines.storage.parts import THREADS, OrderedDigest

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence
    from pathlib import Path

    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.stores import Store


class LargeFile:
    """A file that is sent as a multi-part upload, which may have been begun before. Several threads may send its parts."""

    def __init__(
        self, store: Store, remote: str, file: Path, parts: Sequence[Part], stop: threading.Event
    ) -> None:
        self.remote = remote
        self.file = file
        self._upload = S3Upload(store, remote)
        self._parts = parts
        self._before = local_version(file)
        self._digest = OrderedDigest(stop)
        self._etags: dict[int, str] = {}
        self._sent: dict[int, SentPart] = {}
        self._begun: Sequence[str] = ()
        self._upload_id = ""
        self._completed = False

    def is_there(self, known: RemoteFile) -> bool:
        """Whether an object is what this file would be, sent in these parts."""
        etag = plain_etag(known)
        if etag is None or not etag.endswith(f"-{len(self._parts)}"):
            return False
        return etag == etag_in_parts(self.file, self._parts)

    def begin(self, begun: Sequence[str]) -> None:
        """Go on with the newest of the uploads that were begun, or begin one."""
        self._begun = begun
        for upload_id in reversed(begun):
            with suppress(Exception):  # whatever is wrong with it, another one can be begun
                self._sent = self._upload.list_parts(upload_id)
                self._upload_id = upload_id
                return
        self._upload_id = self._upload.create()

    def abandon(self) -> None:
        """Let the server forget what was sent of it, unless it is there whole."""
        if not self._completed:
            self._upload.abort(self._upload_id)

    def find(self, part: Part, data: bytes) -> str | None:
        """Return the etag of the part if the server has it with these bytes."""
        sent = self._sent.get(part.number + 1)
        return sent.etag if sent is not None and sent.holds(data) else None

    def send(self, part: Part, data: bytes) -> str:
        """Send a part and return its etag."""
        return self._upload.send(self._upload_id, part, data)

    def finish(self, part: Part, data: bytes, etag: str) -> bytes | None:
        """Take note of a part; with the last one, complete the object and return the file's digest."""
        self._etags[part.number + 1] = etag
        if self._digest.add(part.number, data) < len(self._parts):
            return None
        check_unchanged(self.file, self._before)
        self._upload.complete(self._upload_id, self._etags)
        self._completed = True
        for upload_id in self._begun:
            if upload_id != self._upload_id:
                self._upload.abort(
                    upload_id
                )  # the object is there; what is left over costs only room
        return self._digest.digest()


def read_local(file: Path, part: Part) -> bytes:
    """Return a part of a file, which is not changed meanwhile."""
    with open(file, "rb", buffering=0) as opened:  # noqa: PTH123 - thousands of them
        data = os.pread(opened.fileno(), part.size, part.start) if part.size else b""
        grown = part.size and os.fstat(opened.fileno()).st_size < part.start + part.size
    if len(data) != part.size or grown:
        raise DataError(
            f"{str(file)!r} changes while it is read. Whoever writes it has to end first."
        )
    return data


def check_unchanged(file: Path, before: tuple[int, int, int]) -> None:
    """Raise if a file is not what it was."""
    if local_version(file) != before:
        raise DataError(
            f"{str(file)!r} changes while it is read. Whoever writes it has to end first."
        )


def local_version(file: Path) -> tuple[int, int, int]:
    """Return what tells whether a file was written to."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def plain_etag(file: RemoteFile) -> str | None:
    """Return the etag that a store tells of an object, without its quotes."""
    kind, _, value = (file.version or "").partition("=")
    return value.strip('"') if kind.lower() == "etag" else None


def etag_in_parts(file: Path, parts: Sequence[Part]) -> str:
    """Return the etag that S3 gives a file which was sent in these parts."""

    def take(part: Part) -> bytes:
        return bytes(md5(read_local(file, part)).digest())

    with ThreadPoolExecutor(THREADS) as pool:
        sums = b"".join(pool.map(take, parts))
    return f"{md5(sums).hexdigest()}-{len(parts)}"
