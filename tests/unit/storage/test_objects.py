"""Python values as files: what comes back, what is refused, and what is never read."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.objects import has_own_format, is_json, read_object, write_object
from airflow_mlpipelines.storage.stores import Store, StoreSet, open_store

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store("main", f"file://{tmp_path}/main")


@pytest.fixture
def stores(store: Store) -> StoreSet:
    return StoreSet([store], default="main")


def hand_on(value: Any, stores: StoreSet) -> Any:
    """What comes out at the other end."""
    return read_object(write_object(value, stores.default), stores)


# ---- what comes back -----------------------------------------------------------------------------

FRAMES = {
    "mixed columns": {"n": [1, 2, 3], "x": [0.5, None, 2.0], "t": ["a", None, "ü"]},
    "time zones": {"t": pd.date_range("2024-03-30", periods=3, tz="Europe/Zurich")},
    "nanoseconds": {"t": pd.to_datetime(["2024-01-01 00:00:00.123456789"])},
    "time deltas": {"t": pd.to_timedelta(["1s", "2h"])},
    "periods": {"p": pd.period_range("2024", periods=2, freq="M")},
    "intervals": {"i": pd.interval_range(0, 2)},
    "decimals": {"d": [decimal.Decimal("1.10"), None]},
    "dates": {"d": [dt.date(2024, 1, 1), None]},
    "bytes": {"b": [b"\x00", None]},
    "nullable integers": {"n": pd.array([1, None], dtype="Int64")},
    "truth with gaps": {"b": [True, None, False]},
    "large integers with gaps": {"n": pd.Series([1, None, 2**60 + 1], dtype=object)},
    "small types": {"u": np.array([1], "uint8"), "f": np.array([1], "float16")},
    "embeddings": {"e": [np.array([0.1, 0.2]), np.array([0.3])]},
    "texts as categories": {
        "c": pd.Categorical(["x", "y"], categories=["z", "y", "x"], ordered=True)
    },
    "numbers as categories": {"c": pd.Categorical([3, None, 1], categories=[9, 3, 1])},
    "categories without rows": {"c": pd.Categorical([], categories=["q", "r"])},
    "no rows": {"n": pd.Series([], dtype="int32")},
    "no columns": {},
}


@pytest.mark.parametrize("columns", FRAMES.values(), ids=FRAMES.keys())
def test_a_pandas_frame_comes_back_as_it_was(columns: dict[str, Any], stores: StoreSet) -> None:
    frame = pd.DataFrame(columns)
    pd.testing.assert_frame_equal(hand_on(frame, stores), frame)


INDEXES = {
    "labels": pd.Index(["r", "s"], name="row"),
    "range": pd.RangeIndex(5, 9, 2),
    "time with frequency": pd.date_range("2024", periods=2, freq="h", tz="UTC"),
    "time deltas with frequency": pd.timedelta_range("1h", periods=2),
    "periods": pd.period_range("2024", periods=2, freq="Q"),
    "categories": pd.CategoricalIndex([5, 3], categories=[5, 3, 1]),
    "two levels": pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["s", "n"]),
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_the_index_of_a_pandas_frame_comes_back(index: Any, stores: StoreSet) -> None:
    frame = pd.DataFrame({"a": [1, 2]}, index=index)
    pd.testing.assert_frame_equal(hand_on(frame, stores), frame)


@pytest.mark.parametrize(
    "names",
    [
        pd.Index([0, 1]),
        pd.Index(["a", "b"], name="kind"),
        pd.MultiIndex.from_tuples([("a", 1), ("b", 2)]),
    ],
    ids=["numbers", "named", "two levels"],
)
def test_the_column_names_of_a_pandas_frame_come_back(names: Any, stores: StoreSet) -> None:
    frame = pd.DataFrame([[1, 2.5]], columns=names)
    pd.testing.assert_frame_equal(hand_on(frame, stores), frame)


def test_a_pyarrow_table_comes_back_with_its_dictionaries(stores: StoreSet) -> None:
    table = pa.table(
        {
            "n": pa.array([3, 1, None]).dictionary_encode(),
            "t": pa.chunked_array([["a"], ["b", "a"]]).dictionary_encode(),
            "d": pa.array([decimal.Decimal("1.5"), None, None], pa.decimal128(10, 2)),
        }
    ).replace_schema_metadata({"origin": "here"})
    back = hand_on(table, stores)
    assert back.schema.equals(table.schema, check_metadata=True)
    assert back.to_pydict() == table.to_pydict()


def test_a_polars_frame_comes_back(stores: StoreSet) -> None:
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame(
        {
            "n": [1, None],
            "t": [dt.datetime(2024, 1, 1, tzinfo=dt.UTC), None],
            "e": pl.Series(["x", "y"], dtype=pl.Enum(["z", "y", "x"])),
            "c": pl.Series(["x", "y"], dtype=pl.Categorical),
            "d": [decimal.Decimal("1.10"), None],
            "l": [[1, 2], []],
        }
    )
    back = hand_on(frame, stores)
    assert isinstance(back, pl.DataFrame)
    assert back.schema == frame.schema
    assert back.equals(frame)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(7),
        np.array([], dtype="complex64"),
        np.array(["2024-01-01", "NaT"], dtype="datetime64[ns]"),
        np.array([(1, "x")], dtype=[("n", "i4"), ("t", "U3")]),
        np.array([b"a", b"bc"]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_an_array_comes_back(array: Any, stores: StoreSet) -> None:
    back = hand_on(array, stores)
    assert back.dtype == array.dtype
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array, strict=True)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x00\xff",
        {"a": [1, 2.5, True, None, {"ü": "\ud800"}]},
        [2**80, -0.0, 1e300],
        "text",
        {},
    ],
    ids=repr,
)
def test_bytes_and_json_come_back(value: object, stores: StoreSet) -> None:
    back = hand_on(value, stores)
    assert back == value
    assert type(back) is type(value)


def test_infinite_numbers_come_back(stores: StoreSet) -> None:
    back = hand_on([float("inf"), float("nan")], stores)
    assert back[0] == float("inf")
    assert back[1] != back[1]


# ---- where it lies -------------------------------------------------------------------------------


def test_an_object_is_named_by_its_content(store: Store) -> None:
    artifact = write_object(b"hello", store)
    digest = artifact.digest.removeprefix("blake3:")
    assert artifact == Artifact(
        uri=f"{store.url}/objects/{digest[:2]}/{digest}.bin",
        digest="blake3:ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f",
        size=5,
        files=1,
        kind="object",
        media_type="application/octet-stream",
    )
    assert store.read_bytes(f"objects/{digest[:2]}/{digest}.bin") == b"hello"


def test_equal_values_share_a_file_that_is_written_once(store: Store, tmp_path: Path) -> None:
    first = write_object({"a": 1}, store)
    (path,) = [found for found in (tmp_path / "main" / "objects").rglob("*") if found.is_file()]
    before = path.stat()
    assert write_object({"a": 1}, store) == first
    assert path.stat().st_ino == before.st_ino


def test_tables_are_files_that_other_programs_read(store: Store, tmp_path: Path) -> None:
    write_object(pd.DataFrame({"c": pd.Categorical([2, 1]), "n": [1, 2]}), store)
    (path,) = (tmp_path / "main" / "objects").rglob("*.parquet")
    assert pa.parquet.read_table(path).to_pydict() == {"c": [2, 1], "n": [1, 2]}


def test_the_format_is_told_without_importing_any_library() -> None:
    program = (
        "import sys\n"
        "from airflow_mlpipelines.storage.objects import has_own_format\n"
        "class DataFrame: __module__ = 'pandas.core.frame'\n"
        "assert has_own_format(DataFrame()) and has_own_format(b'') and not has_own_format({})\n"
        "heavy = {'pandas', 'polars', 'pyarrow', 'numpy', 'pickle', 'airflow'} & set(sys.modules)\n"
        "assert heavy <= {'pickle'}, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_subclasses_are_no_tables_since_they_would_come_back_as_something_else() -> None:
    class GeoFrame(pd.DataFrame):  # type: ignore[misc]
        pass

    assert not has_own_format(GeoFrame())
    assert not has_own_format(np.ma.masked_array([1], mask=[True]))


# ---- what is refused -----------------------------------------------------------------------------

WITHOUT_FORM = {
    "an object of one's own": object(),
    "a tuple": (1, 2),
    "a number as a key": {1: "a"},
    "an array of objects": np.array([object()]),
    "two columns of one name": pd.DataFrame([[1, 2]], columns=["a", "a"]),
    "names of several types": pd.DataFrame([[1, 2]], columns=["a", 1]),
    "a column of several types": pd.DataFrame({"a": [1, "secret"]}),
    "a column of dicts": pd.DataFrame({"a": [{"x": 1}, {"y": 2}]}),
    "a column of sets": pd.DataFrame({"a": [{1}]}),
    "complex numbers in a frame": pd.DataFrame({"a": [1j]}),
}


@pytest.mark.parametrize("value", WITHOUT_FORM.values(), ids=WITHOUT_FORM.keys())
def test_what_has_no_open_format_is_refused_with_the_ways_out(
    value: object, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"can.t be handed on as data: .* allow_pickle") as caught:
        write_object(value, store)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "main").exists()


def test_a_refused_polars_frame_says_so(store: Store) -> None:
    pl = pytest.importorskip("polars")
    with pytest.raises(DataError, match="column of Python objects"):
        write_object(pl.DataFrame({"o": [object()]}), store)


def test_what_has_no_open_format_is_a_pickle_where_that_is_allowed(stores: StoreSet) -> None:
    artifact = write_object({1: (2, 3)}, stores.default, allow_pickle=True)
    assert artifact.media_type == "application/x-python-pickle"
    assert read_object(artifact, stores, allow_pickle=True) == {1: (2, 3)}


def test_what_has_an_open_format_is_no_pickle_even_where_that_is_allowed(store: Store) -> None:
    media_type = write_object(np.zeros(2), store, allow_pickle=True).media_type
    assert media_type == "application/x-npy"


def test_what_can_not_even_be_pickled_is_refused(store: Store) -> None:
    with pytest.raises(DataError, match="nor can it be pickled"):
        write_object(lambda: None, store, allow_pickle=True)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_is_not_read_where_that_is_not_allowed(stores: StoreSet, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    artifact = write_object(Bomb(trace), stores.default, allow_pickle=True)
    with pytest.raises(DataError, match="runs whatever code is in it"):
        read_object(artifact, stores)
    assert not trace.exists()


def test_an_array_is_never_read_by_unpickling(stores: StoreSet, tmp_path: Path) -> None:
    """A ``.npy`` file with pickled elements, under its true digest."""
    from airflow_mlpipelines._digest import digest_bytes

    trace = tmp_path / "trace"
    with (tmp_path / "bomb.npy").open("wb") as file:
        np.lib.format.write_array(file, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    data = (tmp_path / "bomb.npy").read_bytes()
    digest = digest_bytes(data)
    path = f"objects/{digest[:2]}/{digest}.npy"
    stores.default.write_bytes(path, data)
    artifact = Artifact(
        stores.default.uri(path), f"blake3:{digest}", len(data), 1, "object", "application/x-npy"
    )
    with pytest.raises(DataError, match="can't be read as application/x-npy"):
        read_object(artifact, stores, allow_pickle=True)
    assert not trace.exists()


# ---- what is never read --------------------------------------------------------------------------


def test_data_that_is_gone_is_an_error_and_not_a_path(stores: StoreSet, tmp_path: Path) -> None:
    artifact = write_object(b"hello", stores.default)
    (path,) = (tmp_path / "main" / "objects").rglob("*.bin")
    path.unlink()
    with pytest.raises(DataError, match=r"is gone\. Clear the task"):
        read_object(artifact, stores)


def test_data_that_was_changed_is_not_decoded(stores: StoreSet, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    artifact = write_object({1: "x" * 1000}, stores.default, allow_pickle=True)
    (path,) = (tmp_path / "main" / "objects").rglob("*.pickle")
    path.write_bytes(pickle.dumps(Bomb(trace)).ljust(artifact.size, b"\0"))
    with pytest.raises(DataError, match="was changed after it was written"):
        read_object(artifact, stores, allow_pickle=True)
    assert not trace.exists()


def test_an_artifact_of_the_wrong_size_is_not_believed(stores: StoreSet) -> None:
    artifact = write_object(b"hello", stores.default)
    with pytest.raises(DataError, match="was changed"):
        read_object(dataclasses.replace(artifact, size=6), stores)


HOSTILE_URIS = [
    "file:///etc/passwd",
    "/etc/passwd",
    "http://169.254.169.254/latest/meta-data",
    "s3://foreign/objects/ab/abc.bin",
    "memory://objects/ab/abc.bin",
    "{url}/../secret.bin",
    "{url}/objects/../../secret.bin",
    "{url}/objects/%2e%2e/%2e%2e/secret.bin",
    "{url}/secret.bin",
    "{url}.evil/secret.bin",
    "{url}",
    "",
]


@pytest.mark.parametrize("uri", HOSTILE_URIS)
def test_nothing_is_read_but_what_the_digest_names(
    uri: str, stores: StoreSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file would be there, with this very digest: it is just no object of the datastore."""
    artifact = write_object(b"hello", stores.default)
    for place in (tmp_path, tmp_path / "main"):
        (place / "secret.bin").write_bytes(b"hello")
    reads: list[str] = []
    monkeypatch.setattr(Store, "read_bytes", lambda _self, path: reads.append(path) or b"hello")
    with pytest.raises(DataError):
        read_object(dataclasses.replace(artifact, uri=uri.format(url=stores.default.url)), stores)
    assert reads == []


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "file"},
        {"media_type": None},
        {"media_type": "application/x-unknown"},
        {"media_type": "application/x-npy"},
        {"digest": "version:" + "0" * 64},
        {"digest": "blake3:" + "0" * 64},
    ],
    ids=repr,
)
def test_an_artifact_that_was_edited_is_refused(changes: dict[str, Any], stores: StoreSet) -> None:
    artifact = write_object(b"hello", stores.default)
    with pytest.raises(DataError):
        read_object(dataclasses.replace(artifact, **changes), stores)


def test_objects_work_on_a_store_that_is_no_directory() -> None:
    store = open_store("remote", "memory://test-objects")
    stores = StoreSet([store], default="remote")
    artifact = write_object({"a": 1}, store)
    assert is_json(artifact)
    assert read_object(artifact, stores) == {"a": 1}
    store.delete(artifact.uri.removeprefix(f"{store.url}/"))
    with pytest.raises(DataError, match="is gone"):
        read_object(artifact, stores)
