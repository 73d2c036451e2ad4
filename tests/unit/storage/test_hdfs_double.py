"""HDFS without Java: fsspec's wrapper of Arrow's filesystems, which its driver is, over the local one of Arrow."""

from __future__ import annotations

import os
import threading

import pytest

from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.stores import PART_SUFFIX, Store, StoreSet, open_store
from airflow_mlpipelines.storage.transfer import (
    commit_output,
    fetch,
    missing_artifacts,
    pin_external,
)
from airflow_mlpipelines.storage.trees import digest_tree


@pytest.fixture
def store(tmp_path):
    """A datastore whose driver is what hdfs:// has, and whose files are below a directory."""
    arrow = pytest.importorskip("pyarrow.fs")
    from fsspec.implementations.arrow import ArrowFSWrapper

    (tmp_path / "hdfs").mkdir()
    filesystem = ArrowFSWrapper(arrow.LocalFileSystem())
    return Store("lake", "hdfs://node:8020/team", filesystem=filesystem, root=f"{tmp_path}/hdfs")


@pytest.fixture
def made(tmp_path):
    root = tmp_path / "made"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "grüße 🛫.txt").write_text("hello")
    (root / "empty").write_bytes(b"")
    (root / "large").write_bytes(os.urandom(9_000_001))
    return root


def test_an_output_goes_there_and_comes_back(store, made, tmp_path):
    stores = StoreSet([store], "lake")

    artifact = commit_output(store, "run/out", made, step_run="r")
    place = fetch(artifact, stores, blobs=BlobCache(tmp_path / "b"), target=tmp_path / "t")

    assert artifact.uri == "hdfs://node:8020/team/run/out"
    assert digest_tree(place).digest == artifact.digest == digest_tree(made).digest
    assert digest_tree(tmp_path / "hdfs/run/out").digest == artifact.digest
    assert missing_artifacts([artifact], stores) == []
    store.delete("run/out")
    assert "is gone" in missing_artifacts([artifact], stores)[0][1]


def test_a_file_is_replaced_whole(store, tmp_path):
    store.write_bytes("deep/er/a.txt", b"one")
    before = pin_external(store, "deep", how="version")
    store.write_bytes("deep/er/a.txt", b"three")

    assert store.read_bytes("deep/er/a.txt") == b"three"
    assert pin_external(store, "deep", how="version").digest != before.digest
    assert list((tmp_path / "hdfs").rglob(f"*{PART_SUFFIX}")) == []


def test_data_are_transferred_there_and_back(store, made, tmp_path):
    local = open_store("local", f"file://{tmp_path}")
    digest = digest_tree(made).digest

    for source, target in (((local, "made"), (store, "copy")), ((store, "copy"), (local, "back"))):
        ends = open_end(*source), open_end(*target)
        journal = Journal(local, ends[0].uri, ends[1].uri)
        artifact = pin_external(*source, how="version")
        blobs, stop = BlobCache(tmp_path / "b"), threading.Event()
        done = Transfer(artifact, *ends, journal, blobs, lambda _: None, stop).run()
        assert done.digest == digest

    assert digest_tree(tmp_path / "back").digest == digest
