"""Python values as files, named by their content: what travels between tasks and is no plain JSON.

An object lies at ``objects/<first two digits>/<digest>.<suffix>`` of a datastore, in a format that other
programs read too where there is one:

- pandas and polars DataFrames and pyarrow Tables are Parquet, with what Arrow knows of them: the index,
  categories, time zones, decimals, nullable types. Of a pandas frame, ``attrs`` are left behind, lists
  in cells come back as NumPy arrays, and columns of type ``object`` get the type of what is in them;
- NumPy arrays are ``.npy``, never with pickled elements;
- bytes are themselves, JSON values are ``.json``;
- everything else is a pickle, where the caller says that the deployment allows it.

Equal values share one file, so nothing here ever deletes one. Nothing is decoded before its digest is
checked, and nothing outside ``objects/`` of a registered datastore is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._digest import DIGEST_PREFIX, digest_bytes
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.object_formats import (
    FORMATS_BY_CLASS,
    FORMATS_BY_MEDIA_TYPE,
    JSON,
    PICKLE,
    NoFormError,
    ObjectFormat,
    class_name,
)

if TYPE_CHECKING:
    from airflow_mlpipelines.storage.stores import Store, StoreSet

_FOLDER = "objects"
_SHOWN_URI = 200
_WAYS_OUT = (
    "Return a DataFrame, an array, bytes or plain JSON; or write a file, as an output of a step, and "
    "pass that; or let the deployment use pickles ([mlpipelines] allow_pickle = True)."
)


def has_own_format(value: object) -> bool:
    """Whether ``value`` is of a class that is kept as a file at any size: a table, an array, bytes.

    The class is recognised by its name, so that asking imports nothing.
    """
    return class_name(value) in FORMATS_BY_CLASS


def is_json(artifact: Artifact) -> bool:
    """Whether the artifact is an object that was written as JSON."""
    return artifact.media_type == JSON.media_type


def write_object(value: object, store: Store, *, allow_pickle: bool = False) -> Artifact:
    """Write ``value`` to the datastore, unless an equal one is there, and return what identifies it.

    Args:
        value: A pandas or polars DataFrame, a pyarrow Table, a NumPy array, bytes, or JSON.
        store: The datastore that will hold it.
        allow_pickle: Whether a value of any other kind may be written as a pickle.

    Raises:
        DataError: No open format holds the value, and pickles are not allowed or don't hold it either.
    """
    format_, data = _encode(value, allow_pickle=allow_pickle)
    digest = digest_bytes(data)
    path = _object_path(digest, format_)
    if not store.exists(path):
        store.write_bytes(path, data)
    return Artifact(
        uri=store.uri(path),
        digest=f"{DIGEST_PREFIX}{digest}",
        size=len(data),
        files=1,
        kind="object",
        media_type=format_.media_type,
    )


def read_object(artifact: Artifact, stores: StoreSet, *, allow_pickle: bool = False) -> Any:
    """Return the value that :func:`write_object` wrote.

    The artifact is taken for input that somebody may have made up: only the file that its own digest
    names is read, only in a registered datastore, and only bytes with that digest are decoded.

    Raises:
        DataError: The artifact is no object, lies elsewhere, is gone or changed, is in a format that is
            unknown or can't be read on this machine, or is a pickle where those are not allowed.
    """
    uri = artifact.uri[:_SHOWN_URI]
    format_ = FORMATS_BY_MEDIA_TYPE.get(artifact.media_type or "")
    if artifact.kind != "object" or format_ is None:
        raise DataError(f"{uri} is no object of a format that this release reads.")
    if format_ is PICKLE and not allow_pickle:
        raise DataError(
            f"{uri} is a pickle, and reading one runs whatever code is in it. This deployment doesn't "
            f"allow that, or this process is none that runs tasks. {_WAYS_OUT}"
        )
    store, path = stores.locate(artifact.uri)
    digest = artifact.digest.removeprefix(DIGEST_PREFIX)
    if path != _object_path(digest, format_):
        raise DataError(
            f"{uri} is not where the object with the digest {artifact.digest} lies; somebody has "
            "changed this XCom."
        )
    data = _read(store, path)
    if digest_bytes(data) != digest or len(data) != artifact.size:
        raise DataError(
            f"{uri} doesn't hold the data with the digest {artifact.digest}: it was changed after it "
            "was written. Delete it, and clear the task that made it."
        )
    try:
        return format_.decode(data)
    except ImportError as error:
        raise DataError(
            f"{uri} is {format_.media_type}, and reading that needs {error.name!r}, which is not "
            "installed where this task runs."
        ) from error
    except Exception as error:  # each library has its own; what it is about is the same
        raise DataError(
            f"{uri} can't be read as {format_.media_type}: {type(error).__name__}."
        ) from error


def _encode(value: object, *, allow_pickle: bool) -> tuple[ObjectFormat, bytes]:
    """Return the value's bytes in the first format that holds it."""
    name = class_name(value)
    format_ = FORMATS_BY_CLASS.get(name, JSON)
    try:
        return format_, format_.encode(value)
    except ImportError as error:
        reason = f"that needs {error.name!r}, which is not installed where this task runs"
    except NoFormError as error:
        reason = str(error)
    if not allow_pickle:
        raise DataError(f"a {name} can't be handed on as data: {reason}. {_WAYS_OUT}")
    try:
        return PICKLE, PICKLE.encode(value)
    except Exception as error:  # what __reduce__ and __getstate__ raise is up to their authors
        raise DataError(
            f"a {name} can't be handed on as data: {reason}; nor can it be pickled: {error}. {_WAYS_OUT}"
        ) from error


def _read(store: Store, path: str) -> bytes:
    try:
        return store.read_bytes(path)
    except DataError as error:
        if store.exists(path):
            raise
        raise DataError(
            f"{store.uri(path)} is gone. Clear the task that made it, so that it makes it again."
        ) from error


def _object_path(digest: str, format_: ObjectFormat) -> str:
    return f"{_FOLDER}/{digest[:2]}/{digest}.{format_.suffix}"
