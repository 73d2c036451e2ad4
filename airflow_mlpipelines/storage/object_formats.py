"""The file formats of Python values: how each becomes bytes, and comes back the same.

A class is recognised by its name, so that asking imports nothing; its library is imported to encode and
decode.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class ObjectFormat:
    """How values of some classes become bytes, and come back."""

    media_type: str
    suffix: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


class NoFormError(Exception):
    """The format can't hold this value; says why."""


def class_name(value: object) -> str:
    """Return ``<top package>.<class>``: ``pandas.DataFrame`` in pandas 2 and 3 alike."""
    kind = type(value)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


# ---- tables --------------------------------------------------------------------------------------

_DICTIONARIES = b"mlpipelines.dictionaries"
_INDEX_FREQUENCY = b"mlpipelines.index_frequency"


def _encode_table(table: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = BytesIO()
    try:
        parquet.write_table(_note_dictionaries(table), buffer)
    except pyarrow.ArrowException as error:
        raise NoFormError(f"Parquet can't hold it: {error}") from error
    return buffer.getvalue()


def _decode_table(data: bytes) -> Any:
    from pyarrow import parquet

    return _restore_dictionaries(parquet.read_table(BytesIO(data)))


def _note_dictionaries(table: Any) -> Any:
    """Return the table with the dictionaries of its columns in its metadata.

    Parquet itself keeps only dictionaries of text, and those only where there are rows. They are noted
    as an Arrow stream of the same columns without rows, in base64, named by their position.
    """
    import pyarrow
    from pyarrow.types import is_dictionary, is_nested

    empty = {}
    for position, field in enumerate(table.schema):
        column = table.column(position)
        kind = field.type
        if is_dictionary(kind) and not is_nested(kind.value_type) and column.num_chunks:
            values = column.unify_dictionaries().chunk(0).dictionary
            codes = pyarrow.array([], kind.index_type)
            empty[str(position)] = pyarrow.DictionaryArray.from_arrays(
                codes, values, ordered=kind.ordered
            )
    if not empty:
        return table
    noted = pyarrow.table(empty)
    stream = BytesIO()
    with pyarrow.ipc.new_stream(stream, noted.schema) as writer:
        writer.write_batch(pyarrow.record_batch(empty))
    return _add_metadata(table, _DICTIONARIES, b64encode(stream.getvalue()))


def _restore_dictionaries(table: Any) -> Any:
    """Return the table with the dictionaries that :func:`_note_dictionaries` noted."""
    import pyarrow
    from pyarrow import compute

    table, noted = _take_metadata(table, _DICTIONARIES)
    if noted is None:
        return table
    with pyarrow.ipc.open_stream(b64decode(noted)) as reader:
        empty = reader.read_next_batch()
    for name, column in zip(empty.schema.names, empty.columns, strict=True):
        position, kind = int(name), column.type
        plain = table.column(position).cast(kind.value_type)
        codes = compute.index_in(plain, value_set=column.dictionary).cast(kind.index_type)
        chunks = [
            pyarrow.DictionaryArray.from_arrays(chunk, column.dictionary, ordered=kind.ordered)
            for chunk in codes.chunks
        ]
        field = table.field(position).with_type(kind)
        table = table.set_column(position, field, pyarrow.chunked_array(chunks or [column]))
    return table


def _add_metadata(table: Any, key: bytes, value: bytes) -> Any:
    return table.replace_schema_metadata({**(table.schema.metadata or {}), key: value})


def _take_metadata(table: Any, key: bytes) -> tuple[Any, bytes | None]:
    """Return the table without the entry, and the entry."""
    metadata = dict(table.schema.metadata or {})
    value = metadata.pop(key, None)
    return (table if value is None else table.replace_schema_metadata(metadata or None)), value


def _encode_pandas(frame: Any) -> bytes:
    import pyarrow

    _check_cells(frame)
    try:
        table = pyarrow.Table.from_pandas(frame)
    # Duplicate column names are a plain ValueError; pandas adds its own for some types. The last argument
    # names the column; the one before it, if there is one, quotes a cell.
    except (pyarrow.ArrowException, ValueError, TypeError, NotImplementedError) as error:
        raise NoFormError(f"Parquet can't hold it: {error.args[-1]}") from error
    frequency = getattr(frame.index, "freqstr", None)
    if frequency is not None and hasattr(frame.index, "freq"):
        table = _add_metadata(table, _INDEX_FREQUENCY, frequency.encode())
    return _encode_table(table)


def _check_cells(frame: Any) -> None:
    """Refuse what Arrow would take and give back as something else."""
    from pandas.api.types import infer_dtype

    if infer_dtype(frame.columns).startswith("mixed") and frame.columns.nlevels == 1:
        raise NoFormError("Parquet can't hold column names of several types")
    for position, dtype in enumerate(frame.dtypes):
        column = frame.iloc[:, position]
        if dtype.kind == "O" and infer_dtype(column).startswith("mixed"):
            kinds = {
                type(cell).__name__ for cell in column if isinstance(cell, (dict, set, frozenset))
            }
            if kinds:
                raise NoFormError(
                    f"Parquet can't hold a {sorted(kinds)[0]} in the cells of column "
                    f"{frame.columns[position]!r}"
                )


def _decode_pandas(data: bytes) -> Any:
    table, frequency = _take_metadata(_decode_table(data), _INDEX_FREQUENCY)
    # Only a column of Python integers can have gaps here: NumPy's have none, and the nullable types
    # are known by the metadata. As floats, large numbers would lose their last digits.
    frame = table.to_pandas(integer_object_nulls=True)
    if frequency is not None and frame.index.freq is None:
        frame.index.freq = frequency.decode()
    return frame


def _encode_polars(frame: Any) -> bytes:
    import polars

    if any(dtype == polars.Object for dtype in frame.dtypes):
        raise NoFormError("Parquet can't hold a column of Python objects")
    buffer = BytesIO()
    try:
        frame.write_parquet(buffer)
    except polars.exceptions.PolarsError as error:
        raise NoFormError(f"Parquet can't hold it: {error}") from error
    return buffer.getvalue()


def _decode_polars(data: bytes) -> Any:
    import polars

    return polars.read_parquet(BytesIO(data))


# ---- arrays, JSON, everything else ---------------------------------------------------------------


def _encode_array(array: Any) -> bytes:
    from numpy.lib import format as npy

    buffer = BytesIO()
    try:
        npy.write_array(buffer, array, allow_pickle=False)
    except ValueError as error:
        raise NoFormError(f".npy can't hold it: {error}") from error
    return buffer.getvalue()


def _decode_array(data: bytes) -> Any:
    from numpy.lib import format as npy

    return npy.read_array(BytesIO(data), allow_pickle=False)


def _encode_json(value: object) -> bytes:
    if not _is_json(value):
        raise NoFormError("it is no JSON, and no open format is known for it")
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )


def _decode_json(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


def _is_json(value: object) -> bool:
    """Whether JSON gives back just this: no tuple, no number as a key, no subclass."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and _is_json(item) for key, item in value.items())  # type: ignore[attr-defined]
    if kind is list:
        return all(_is_json(item) for item in value)  # type: ignore[attr-defined]
    return value is None or kind in (str, int, float, bool)


def _encode_pickle(value: object) -> bytes:
    import pickle

    return pickle.dumps(value, protocol=5)


def _decode_pickle(data: bytes) -> Any:
    import pickle

    return pickle.loads(data)  # noqa: S301 - only where the deployment allows it


_PARQUET = "application/vnd.apache.parquet"
_PANDAS = ObjectFormat(f"{_PARQUET}; class=pandas", "parquet", _encode_pandas, _decode_pandas)
_POLARS = ObjectFormat(f"{_PARQUET}; class=polars", "parquet", _encode_polars, _decode_polars)
_TABLE = ObjectFormat(f"{_PARQUET}; class=pyarrow", "parquet", _encode_table, _decode_table)
_ARRAY = ObjectFormat("application/x-npy", "npy", _encode_array, _decode_array)
_BYTES = ObjectFormat("application/octet-stream", "bin", bytes, bytes)
JSON = ObjectFormat("application/json", "json", _encode_json, _decode_json)
PICKLE = ObjectFormat("application/x-python-pickle", "pickle", _encode_pickle, _decode_pickle)

FORMATS_BY_CLASS = {
    "pandas.DataFrame": _PANDAS,
    "polars.DataFrame": _POLARS,
    "pyarrow.Table": _TABLE,
    "numpy.ndarray": _ARRAY,
    "builtins.bytes": _BYTES,
}
FORMATS_BY_MEDIA_TYPE = {
    format_.media_type: format_
    for format_ in (_PANDAS, _POLARS, _TABLE, _ARRAY, _BYTES, JSON, PICKLE)
}
