"""Objects that a store takes in parts and puts together in the end: S3's uploads in parts, Azure's blocks.

Each part is checked by the store as it comes: against a checksum that botocore sends with it, against its MD5 on Azure.
"""

from __future__ import annotations

import hashlib
import mimetypes
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.stores import Store

SLOWEST = 32 << 10
"""Bytes a second: a part that is slower does not get there."""
_READ_TIMEOUT = 60.0
"""botocore's own."""
_TRIES = 3
md5 = partial(hashlib.md5, usedforsecurity=False)
_KEPT_HEADERS = (
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "Metadata",
)
"""What an object's copy in parts would lack: unlike a copy in one, it is a new object."""


class SentPart(NamedTuple):
    """A part that S3 has: its etag, which is the MD5 of its bytes unless a key of the customer's encrypts it."""

    etag: str
    size: int

    def holds(self, data: bytes | memoryview) -> bool:
        """Whether these are certainly its bytes."""
        return self.size == len(data) and self.etag.strip('"') == md5(data).hexdigest()


class S3Upload:
    """One object of S3 that is sent in parts.

    Args:
        store: The datastore.
        remote: Bucket and key.
    """

    def __init__(self, store: Store, remote: str) -> None:
        self._filesystem: Any = store.filesystem
        self._bucket, _, self._key = remote.partition("/")

    def create(self, headers: Mapping[str, Any] | None = None) -> str:
        """Begin one and return its id."""
        kind = guess_type(self._key)
        given = headers if headers is not None else {"ContentType": kind} if kind else {}
        return str(self._call("create_multipart_upload", **given)["UploadId"])

    def list_parts(self, upload_id: str) -> dict[int, SentPart]:
        """Return the parts that S3 has, by their numbers, which count from 1."""
        found: dict[int, SentPart] = {}
        marker = 0
        while True:
            page = self._call("list_parts", UploadId=upload_id, PartNumberMarker=marker)
            for item in page.get("Parts", []):
                found[item["PartNumber"]] = SentPart(item["ETag"], item["Size"])
            if not page.get("IsTruncated"):
                return found
            marker = page["NextPartNumberMarker"]

    def send(self, upload_id: str, part: Part, data: bytes | memoryview) -> str:
        """Send a part and return its etag.

        A connection that breaks in the middle can leave the client waiting for ever, whatever its timeouts. So a part has
        its time, and is sent again, a few times.

        Raises:
            FSTimeoutError: It did not get there.
        """
        from fsspec.exceptions import FSTimeoutError

        numbered = {"PartNumber": part.number + 1, "UploadId": upload_id}
        quiet = (self._filesystem.config_kwargs or {}).get("read_timeout") or _READ_TIMEOUT
        allowed = float(quiet) + len(data) / SLOWEST

        def send() -> str:
            answer = self._call("upload_part", allowed, Body=as_bytes(data), **numbered)
            return str(answer["ETag"])

        for _ in range(_TRIES - 1):
            with suppress(FSTimeoutError):
                return send()
        return send()

    def copy(self, upload_id: str, part: Part, source: str, etag: str | None) -> str:
        """Let S3 copy a part of an object that it has, of this version, and return the part's etag."""
        bucket, _, key = source.partition("/")
        answer = self._call(
            "upload_part_copy",
            PartNumber=part.number + 1,
            UploadId=upload_id,
            CopySource={"Bucket": bucket, "Key": key},
            CopySourceRange=f"bytes={part.start}-{part.start + part.size - 1}",
            **({"CopySourceIfMatch": etag} if etag else {}),
        )
        return str(answer["CopyPartResult"]["ETag"])

    def complete(self, upload_id: str, etags: Mapping[int, str]) -> None:
        """Put the parts together: the object is there."""
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(etags.items())]
        self._call(
            "complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": parts}
        )

    def abort(self, upload_id: str) -> None:
        """Let S3 forget what was sent; whatever is wrong with it, it costs only room."""
        with suppress(Exception):
            self._call("abort_multipart_upload", UploadId=upload_id)

    def read_headers(self) -> dict[str, Any]:
        """Return what the object has besides its bytes, as a copy of it has to be created with."""
        answer = self._call("head_object")
        return {name: answer[name] for name in _KEPT_HEADERS if answer.get(name)}

    def read_encryption(self) -> str | None:
        """Return how the object is encrypted: not at all, by S3's own keys (``AES256``), or by the customer's."""
        answer = self._call("head_object")
        if answer.get("SSECustomerAlgorithm"):
            return "customer"
        return answer.get("ServerSideEncryption")

    def _call(
        self, method: str, timeout: float | None = None, /, **arguments: Any
    ) -> dict[str, Any]:
        from fsspec.asyn import sync

        filesystem, place = self._filesystem, {"Bucket": self._bucket, "Key": self._key}
        call = filesystem._call_s3  # noqa: SLF001 - as fsspec names what its calls wait for
        answer: dict[str, Any] = sync(
            filesystem.loop, call, method, timeout=timeout, **place, **arguments
        )
        return answer


def list_unfinished(store: Store, place: str) -> dict[str, list[str]]:
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


class AzureBlob:
    """One blob of Azure, which is sent in blocks: named by whoever sends them, and kept for a week until they are used.

    Args:
        store: The datastore.
        remote: Container and name.
    """

    def __init__(self, store: Store, remote: str) -> None:
        filesystem: Any = store.filesystem
        container, _, self._name = remote.partition("/")
        self._filesystem = filesystem
        self.client: Any = filesystem.service_client.get_blob_client(container, self._name)

    def list_blocks(self) -> dict[str, int]:
        """Return the names and sizes of the blocks that have come and are used in no blob yet."""
        from azure.core.exceptions import ResourceNotFoundError

        try:
            _, waiting = self.run(self.client.get_block_list("uncommitted"))
        except ResourceNotFoundError:
            return {}
        return {block.id: block.size for block in waiting}

    def send(self, name: str, data: bytes | memoryview) -> None:
        """Send a block."""
        given = as_bytes(data)
        self.run(self.client.stage_block(name, given, length=len(given), validate_content=True))

    def commit(self, names: Sequence[str]) -> None:
        """Make the blob of these blocks."""
        from azure.storage.blob import BlobBlock, ContentSettings

        kind = guess_type(self._name)
        settings = {"content_settings": ContentSettings(content_type=kind)} if kind else {}
        # What says to adlfs that a blob is no directory.
        note = {"is_directory": "false"}
        blocks = [BlobBlock(name) for name in names]
        self.run(self.client.commit_block_list(blocks, metadata=note, **settings))
        self._filesystem.invalidate_cache()

    def run(self, request: Coroutine[Any, Any, Any]) -> Any:
        """Wait for what the client is asked."""
        from fsspec.asyn import sync

        async def ask() -> Any:
            return await request

        return sync(self._filesystem.loop, ask)


def guess_type(name: str) -> str | None:
    """Return the content type of a file with such a name, if there is one."""
    return mimetypes.guess_type(name)[0]


def as_bytes(data: bytes | memoryview) -> bytes:
    """Return data as clients take them."""
    return data if isinstance(data, bytes) else bytes(data)
