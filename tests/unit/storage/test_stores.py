from __future__ import annotations

import subprocess
import sys

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.stores import StoreSet, open_store


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    """A datastore of each kind."""
    url = f"file://{tmp_path}/store" if request.param == "file" else f"memory://{tmp_path.name}"
    return open_store("store", url)


def test_what_is_written_can_be_read_and_deleted(store):
    store.write_bytes("a/b.txt", b"hello")

    assert store.exists("a/b.txt")
    assert store.exists("a")
    assert store.read_bytes("a/b.txt") == b"hello"
    store.delete("a")
    assert not store.exists("a/b.txt")
    store.delete("a")


def test_reading_nothing_is_an_error_that_names_it(store):
    with pytest.raises(DataError, match=r"a/b\.txt"):
        store.read_bytes("a/b.txt")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    store = open_store("store", f"file://{tmp_path}")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))

    with pytest.raises(DataError, match="disk full"):
        store.write_bytes("a.txt", b"hello")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "~root", "a\0b"])
def test_no_path_leads_out_of_a_store(store, path):
    for use in (store.uri, store.exists, store.read_bytes, store.delete):
        with pytest.raises(DataError):
            use(path)


def test_an_address_leads_back_to_its_path(store):
    path = "a b/ü%20#?/x"
    store.write_bytes(path, b"1")

    found, back = StoreSet([store], "store").locate(store.uri(path))

    assert (found, back) == (store, path)


def test_an_address_in_no_registered_store_is_not_read(tmp_path):
    stores = StoreSet([open_store("store", f"file://{tmp_path}/store")], "store")

    for uri in (
        "file:///etc/passwd",
        f"file://{tmp_path}/store/../secret",
        f"file://{tmp_path}/store/%2e%2e/secret",
        f"file://{tmp_path}/store-of-others/x",
        "s3://bucket/key",
        "http://169.254.169.254/latest",
        "",
    ):
        with pytest.raises(DataError):
            stores.locate(uri)


def test_the_inner_of_two_stores_is_found(tmp_path):
    outer = open_store("outer", f"file://{tmp_path}")
    inner = open_store("inner", f"file://{tmp_path}/inner")

    assert StoreSet([outer, inner], "outer").locate(f"file://{tmp_path}/inner/x")[0] is inner


def test_an_unknown_store_tells_which_there_are(tmp_path):
    stores = StoreSet([open_store("blobstore", f"file://{tmp_path}")], "blobstore")

    with pytest.raises(DataError, match="Did you mean 'blobstore'"):
        stores["blobstor"]


def test_an_unknown_protocol_is_an_error_that_names_the_datastore():
    with pytest.raises(
        DataError, match=r"datastore 'store': 'nosuch://bucket' .*not known: nosuch"
    ):
        open_store("store", "nosuch://bucket")


@pytest.mark.parametrize(
    ("url", "driver", "extra"),
    [
        ("s3://bucket", "s3fs", "s3"),
        ("gs://bucket", "gcsfs", "gcs"),
        ("abfs://container", "adlfs", "azure"),
        ("hdfs://node/data", "pyarrow.fs", "hdfs"),
        ("sftp://host/data", "paramiko", "sftp"),
        ("https://host/data", "aiohttp", "http"),
    ],
)
def test_a_driver_that_is_missing_is_named_with_the_extra_that_installs_it(url, driver, extra):
    # A process of its own: what fsspec has imported once stays imported.
    script = f"""
import sys
sys.modules[{driver!r}] = None
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.stores import open_store
try:
    open_store("lake", {url!r})
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert "datastore 'lake'" in done.stdout
    assert f"Install the extra 'airflow-mlpipelines[{extra}]'." in done.stdout
