"""Parts of the files of a remote store, read by any number of threads at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.parts import StoppedError
from airflow_mlpipelines.storage.s3_objects import NotServedError, find_objects

if TYPE_CHECKING:
    import threading

    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.stores import Store


def read_range(
    store: Store, path: str, file: RemoteFile, part: Part, *, stop: threading.Event
) -> bytes | memoryview:
    """Return a part of a file, of the version that was listed where the store can be asked for that one.

    Args:
        store: The datastore.
        path: Where the file is on it.
        file: As it was listed.
        part: Which part.
        stop: Says, when it is set, that nothing is wanted any more.

    Raises:
        DataError: The file has another size than when it was listed, or another version.
        Exception: What the store's driver raises.
    """
    if not part.size:
        return b""
    remote, objects = store.remote_path(path), find_objects(store)
    whole = part.size == file.size
    if objects is not None:
        kind, _, etag = (file.version or "").partition("=")
        try:
            wanted = etag if kind.lower() == "etag" else None
            return objects.read(remote, part, whole=whole, etag=wanted)
        except NotServedError:
            if stop.is_set():
                raise StoppedError("stopped") from None
    end = part.start + part.size
    data: bytes = store.filesystem.cat_file(
        remote, **({} if whole else {"start": part.start, "end": end})
    )
    if len(data) != part.size:
        raise DataError(
            f"{store.uri(path)} had {file.size} bytes when it was listed, and has others now. Start a new run, "
            "which takes it as it is."
        )
    return data
