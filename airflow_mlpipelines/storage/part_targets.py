"""Large files at the target of a transfer: their parts come in any order, and they show when they are whole.

What an earlier try has brought stays there. It is known again by a token, which the transfer's journal keeps.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from airflow_mlpipelines.storage.ends import LocalEnd, RemoteEnd
from airflow_mlpipelines.storage.multipart import AzureBlob, S3Upload, SentPart
from airflow_mlpipelines.storage.parts import PartsJournal, read_part, write_part
from airflow_mlpipelines.storage.stores import PART_SUFFIX, part_beside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlpipelines.storage.ends import End
    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.stores import Store


class PartTarget(ABC):
    """One large file at the target. Several threads may bring its parts at once.

    Attributes:
        parts: What it is cut into.
    """

    def __init__(self, file: RemoteFile, parts: Sequence[Part]) -> None:
        self._file = file
        self.parts = parts

    @abstractmethod
    def begin(self, token: str | None) -> str:
        """Go on with what the token names, or, where that is nothing or is gone, begin anew; return its token."""

    @abstractmethod
    def has(self, part: Part) -> bool:
        """Whether an earlier try has brought this part of this version of the file."""

    def read(self, part: Part) -> bytes | None:
        """Return a part that is there, or None where it can't be read before the file is whole."""
        del part
        return None

    @abstractmethod
    def write(self, part: Part, data: bytes | memoryview) -> None:
        """Bring a part, unless the target certainly has these very bytes of it."""

    @abstractmethod
    def finish(self) -> None:
        """Show the file: all parts are there."""

    @abstractmethod
    def abandon(self, token: str) -> None:
        """Remove what the token names: it is of another version of the file."""

    def close(self) -> None:  # noqa: B027 - most hold nothing open
        """Hold nothing open any more; what was brought stays."""


class LocalParts(PartTarget):
    """A file beside the target's place, which takes that place in the end. The token is its name."""

    def __init__(self, place: Path, file: RemoteFile, parts: Sequence[Part]) -> None:
        super().__init__(file, parts)
        self._place = place
        self._made = ""
        self._journal: PartsJournal | None = None
        self._resumed = False

    def begin(self, token: str | None) -> str:
        """Go on with the file of that name, if there is one."""
        self._place.parent.mkdir(parents=True, exist_ok=True)
        known = self._part_file(token) if token is not None else None
        self._resumed = known is not None and known.is_file()
        self._made = str(known) if self._resumed else part_beside(str(self._place))
        journal = self._journal_of(self._made)
        if not self._resumed:
            journal.unlink(missing_ok=True)
        self._journal = PartsJournal(journal).__enter__()
        return os.path.basename(self._made)  # noqa: PTH119 - a string like its neighbours

    def has(self, part: Part) -> bool:
        """Whether it was noted, on this machine and since it was started."""
        noted = self._journal is not None and self._journal.has(self._file, part)
        return noted and self._resumed and read_part(self._made, part) is not None

    def read(self, part: Part) -> bytes | None:
        """Return a part that is there."""
        return read_part(self._made, part)

    def write(self, part: Part, data: bytes | memoryview) -> None:
        """Bring a part, unless the file has these bytes."""
        if not (self._resumed and read_part(self._made, part) == data):
            write_part(self._made, part, data)
        if self._journal is not None:
            self._journal.note(self._file, part)

    def finish(self) -> None:
        """Put the file in its place."""
        handle = os.open(self._made, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(self._made, self._place)  # noqa: PTH105 - both names are strings or paths
        self.close()
        self._journal_of(self._made).unlink(missing_ok=True)

    def abandon(self, token: str) -> None:
        """Delete the file of that name."""
        known = self._part_file(token)
        if known is not None:
            known.unlink(missing_ok=True)
            self._journal_of(str(known)).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.__exit__()
            self._journal = None

    def _part_file(self, token: str) -> Path | None:
        if "/" in token or not token.endswith(PART_SUFFIX):  # none that was given out here
            return None
        return self._place.parent / token

    @staticmethod
    def _journal_of(made: str) -> Path:
        return Path(f"{made.removesuffix(PART_SUFFIX)}.parts{PART_SUFFIX}")


class S3Parts(PartTarget):
    """An upload in parts. The token is its id; which parts it has S3 tells."""

    def __init__(
        self,
        store: Store,
        remote: str,
        file: RemoteFile,
        parts: Sequence[Part],
        *,
        source: str | None = None,
    ) -> None:
        super().__init__(file, parts)
        self._store = store
        self._upload = S3Upload(store, remote)
        self._source = source
        self._id = ""
        self._sent: dict[int, SentPart] = {}
        self._etags: dict[int, str] = {}

    def begin(self, token: str | None) -> str:
        """Go on with the upload of that id, if S3 still has it."""
        if token is not None:
            with suppress(Exception):  # whatever is wrong with it, another one can be begun
                self._sent = self._upload.list_parts(token)
                self._id = token
                return token
        headers = S3Upload(self._store, self._source).read_headers() if self._source else None
        self._id = self._upload.create(headers)
        return self._id

    def has(self, part: Part) -> bool:
        """Whether S3 has the part: in an upload of this version of the file it can be no other."""
        sent = self._sent.get(part.number + 1)
        if sent is None or sent.size != part.size:
            return False
        self._etags[part.number + 1] = sent.etag
        return True

    def write(self, part: Part, data: bytes | memoryview) -> None:
        """Send a part, unless S3 tells of it that it has these bytes."""
        sent = self._sent.get(part.number + 1)
        known = sent is not None and sent.holds(data)
        self._etags[part.number + 1] = (
            sent.etag if sent is not None and known else self._upload.send(self._id, part, data)
        )

    def copy(self, part: Part) -> None:
        """Let S3 copy a part of the source."""
        kind, _, etag = (self._file.version or "").partition("=")
        wanted = etag if kind.lower() == "etag" else None
        self._etags[part.number + 1] = self._upload.copy(self._id, part, self._source or "", wanted)

    def finish(self) -> None:
        """Complete the upload."""
        self._upload.complete(self._id, self._etags)

    def abandon(self, token: str) -> None:
        """Abort the upload of that id."""
        self._upload.abort(token)


class AzureParts(PartTarget):
    """Blocks of a blob. The token is in their names, or what is in them is."""

    def __init__(self, store: Store, remote: str, file: RemoteFile, parts: Sequence[Part]) -> None:
        super().__init__(file, parts)
        self._blob = AzureBlob(store, remote)
        self._token = ""
        self._there: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def begin(self, token: str | None) -> str:
        """Go on with the blocks of that token."""
        self._token = token or uuid4().hex[:_BLOCK_TOKEN]
        self._there = self._blob.list_blocks()
        return self._token

    def has(self, part: Part) -> bool:
        """Whether there is a block for it with the token in its name."""
        name = name_block(part, self._token)
        if self._there.get(name) != part.size:
            return False
        self._names[part.number] = name
        return True

    def write(self, part: Part, data: bytes | memoryview) -> None:
        """Send a block."""
        # What a version names is known by the token; other bytes have to tell by themselves what they are.
        token = self._token if self._file.names_content else digest_block(data)
        name = name_block(part, token)
        if self._there.get(name) != part.size:
            self._blob.send(name, data)
        self._names[part.number] = name

    def finish(self) -> None:
        """Commit the blocks."""
        self._blob.commit([self._names[part.number] for part in self.parts])

    def abandon(self, token: str) -> None:
        """Do nothing: Azure forgets blocks that were never committed."""


_BLOCK_TOKEN = 26


def name_block(part: Part, token: str) -> str:
    """Return the name of a part's block: 32 characters, as adlfs' own, for all of a blob's have to be as long."""
    return f"{part.number:05d}-{token[:_BLOCK_TOKEN]}"


def digest_block(data: bytes | memoryview) -> str:
    """Return what names these bytes in the name of a block."""
    from blake3 import blake3

    return blake3(data).hexdigest()[:_BLOCK_TOKEN]


def open_target(end: End, file: RemoteFile, parts: Sequence[Part]) -> PartTarget | None:
    """Return a large file at the target of a transfer, or None where it takes no parts."""
    if isinstance(end, LocalEnd):
        return LocalParts(end.file(file.path), file, parts)
    if not isinstance(end, RemoteEnd):
        return None
    store, remote = end.store, end.store.remote_path(end.below(file.path))
    if hasattr(store.filesystem, "call_s3") and store.protocol.name == "S3":
        return S3Parts(store, remote, file, parts)
    if hasattr(store.filesystem, "service_client") and store.protocol.name.startswith("Azure"):
        return AzureParts(store, remote, file, parts)
    return None
