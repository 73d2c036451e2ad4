"""External data of remote stores read for their digest: kept for the steps where that is of use and there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage import reading
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.disk_space import FullDiskError
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import fetch, pin_external
from airflow_mlpipelines.storage.trees import digest_tree

SIZE = 9 << 20


@pytest.fixture
def store(tmp_path):
    store = open_store("lake", f"memory://{tmp_path.name}")
    yield store
    store.delete("")


@pytest.fixture
def raw(store, tmp_path):
    """A directory on the store, and here."""
    here = tmp_path / "raw"
    (here / "sub").mkdir(parents=True)
    for name, data in {"a.bin": os.urandom(SIZE), "sub/b.txt": b"1", "empty": b""}.items():
        (here / name).write_bytes(data)
        store.write_bytes(f"raw/{name}", data)
    return here


def kept(blobs):
    return [path for path in blobs._directory.rglob("*") if path.stat().st_size >= SIZE]


def test_what_is_larger_than_the_cache_may_hold_is_read_and_written_nowhere(store, raw, tmp_path):
    small, large = (
        BlobCache(tmp_path / name, limit=limit) for name, limit in (("s", 1), ("l", 1 << 30))
    )

    pinned = [pin_external(store, "raw", blobs=blobs) for blobs in (small, large, None)]

    assert {artifact.digest for artifact in pinned} == {digest_tree(raw).digest}
    assert kept(large)
    assert not kept(small)
    assert not list((tmp_path / "s").glob("incoming/*"))
    one_file = pin_external(store, "raw/a.bin", blobs=small)
    assert one_file.digest == digest_tree(raw / "a.bin").digest


def test_the_log_says_how_far_it_is(store, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_REPORT_SECONDS", 0.0)
    for blobs in (BlobCache(tmp_path / "s", limit=1), BlobCache(tmp_path / "l", limit=1 << 30)):
        lines = []
        pin_external(store, "raw", blobs=blobs, emit=lines.append)
        assert any(
            line.startswith(f"Reading {store.uri('raw')}: 9.0 MiB of 9.0 MiB, ") for line in lines
        )


def test_a_disk_without_room_is_told_before_anything_is_fetched(store, raw, tmp_path, monkeypatch):
    blobs, lines = BlobCache(tmp_path / "blobs", limit=1 << 30), []
    pinned = pin_external(store, "raw")
    usage = namedtuple("usage", "total used free")(10 << 30, 10 << 30, SIZE // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    # To plan a run, nothing has to be kept.
    assert pin_external(store, "raw", blobs=blobs, emit=lines.append) == pinned
    assert "is read and not kept for its steps: this machine's disk is full" in lines[0]

    with pytest.raises(DataError, match=r"9.0 MiB of data .* where 4.5 MiB are free") as caught:
        fetch(pinned, StoreSet([store], "lake"), blobs=blobs, target=tmp_path / "t")
    assert "$AIRFLOW_HOME" in str(caught.value)
    assert "'direct'" in str(caught.value)
    assert not (tmp_path / "t").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "mlpipelines-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("only who may mount a file system can make a small one")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_others_fill_meanwhile_is_told_and_left_empty(store, raw, small_disk, tmp_path):
    blobs = BlobCache(small_disk / "blobs", limit=1 << 30)

    def fetch_more(made):  # than was asked room for
        with made.open("wb") as file:
            for _ in range(16):
                file.write(os.urandom(1 << 20))

    with pytest.raises(FullDiskError, match="this machine's disk is full"):
        blobs.add(SIZE, fetch_more)

    # The blob itself fits, and the step's copy of it does not.
    pinned = pin_external(store, "raw")
    with pytest.raises(FullDiskError, match=r"9.0 MiB of data are to go to .*/work"):
        fetch(pinned, StoreSet([store], "lake"), blobs=blobs, target=small_disk / "work" / "t")
