"""Objects that their store copies by itself: nothing passes through this machine."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import StoreError
from airflow_mlpipelines.storage.ends import RemoteEnd
from airflow_mlpipelines.storage.multipart import AzureBlob, S3Upload
from airflow_mlpipelines.storage.part_targets import S3Parts
from airflow_mlpipelines.storage.parts import cut, part_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_mlpipelines.storage.ends import End
    from airflow_mlpipelines.storage.listing import RemoteFile

_PART = 64 << 20
_LARGE = 2 * _PART
"""From this size on S3 copies in parts, several at a time; in one it could not copy more than 5 GB."""
_ASK_SECONDS = (0.2, 5.0)
"""How long to wait before Azure is asked again how far it is: at first, and at most."""
_MD5 = re.compile(r"(?i)etag=\"?([0-9a-f]{32})\"?")
_PLAIN_ENCRYPTION = (None, "AES256")


def copies_by_itself(source: End, target: End) -> bool:
    """Whether both ends are of one store, seen with the same credentials, that copies within itself."""
    if not (isinstance(source, RemoteEnd) and isinstance(target, RemoteEnd)):
        return False
    ours, theirs = source.store, target.store
    return ours.protocol.copies and bool(ours.filesystem == theirs.filesystem)


def open_copy(source: End, target: End, file: RemoteFile) -> S3Parts | None:
    """Return an object that S3 copies in parts, or None where it is copied in one."""
    if source.store.protocol.name != "S3" or file.size < _LARGE:
        return None
    parts = cut(file.size, max(_PART, part_size(file.size)))
    places = (end.store.remote_path(end.below(file.path)) for end in (source, target))
    remote = next(places)
    return S3Parts(target.store, next(places), file, parts, source=remote)


def copy_file(
    source: End,
    target: End,
    name: str,
    tell: Callable[[int], None],
    check: Callable[[], None],
) -> None:
    """Have one file copied, and return when it is there.

    Args:
        source: Where it is.
        target: Where it goes.
        name: Its path below both.
        tell: Takes how many bytes of it are there.
        check: Raises what ends the copy.

    Raises:
        DataError: The store has failed to copy it.
        Exception: What the store's driver raises, or ``check``.
    """
    places = [end.store.remote_path(end.below(name)) for end in (source, target)]
    filesystem = target.store.filesystem
    if not _is_azure(target):
        filesystem.cp_file(*places)
        return
    blob = AzureBlob(target.store, places[1])
    from azure.core.exceptions import ResourceExistsError

    try:
        filesystem.cp_file(*places)
    except ResourceExistsError:  # a copy that a lost worker has begun is still going on
        _abort_copy(blob)
        filesystem.cp_file(*places)
    try:
        _wait_for_copy(blob, tell, check)
    except BaseException:
        # Until it is whole it would stand there empty.
        _abort_copy(blob)
        filesystem.rm_file(places[1])
        raise


def _wait_for_copy(blob: AzureBlob, tell: Callable[[int], None], check: Callable[[], None]) -> None:
    """Wait until Azure has copied a blob: it answers as soon as it has begun."""
    pause, longest = _ASK_SECONDS
    while True:
        copy = blob.run(blob.client.get_blob_properties()).copy
        if copy.status in (None, "success"):
            return
        if copy.status != "pending":
            said = f": {copy.status_description}" if copy.status_description else ""
            raise StoreError(f"Azure has not copied it, the copy is {copy.status!r}{said}.")
        done = str(copy.progress or "").partition("/")[0]
        if done.isdigit():
            tell(int(done))
        check()
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _abort_copy(blob: AzureBlob) -> None:
    from azure.core.exceptions import AzureError

    try:
        copy = blob.run(blob.client.get_blob_properties()).copy
        if copy.status == "pending":
            blob.run(blob.client.abort_copy(copy.id))
    except AzureError:  # it has just ended
        return


def has_other_bytes(source: End, target: End, file: RemoteFile, copied: RemoteFile) -> bool:
    """Whether a store's own checksums tell that a copy is not what the source is.

    S3's tags of objects that were sent in one are the MD5 of their bytes, but for those that a key of the customer's
    encrypts. Of others, and on other stores, nothing can be told so: False.
    """
    if source.store.protocol.name != "S3":
        return False
    ours, theirs = (_MD5.fullmatch(each.version or "") for each in (file, copied))
    if ours is None or theirs is None or ours[1].lower() == theirs[1].lower():
        return False
    return all(
        S3Upload(end.store, end.store.remote_path(end.below(file.path))).read_encryption()
        in _PLAIN_ENCRYPTION
        for end in (source, target)
    )


def _is_azure(end: End) -> bool:
    return hasattr(end.store.filesystem, "service_client") and end.store.protocol.name.startswith(
        "Azure"
    )
