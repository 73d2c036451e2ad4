"""Datastores on an emulator of Google Cloud Storage."""

from __future__ import annotations

import itertools

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import (
    commit_output,
    fetch,
    missing_artifacts,
    pin_external,
)
from airflow_mlpipelines.storage.trees import digest_tree
from airflow_mlpipelines.storage.uploads import upload_files
from tests.integration.gcs_server import run_gcs
from tests.integration.moving import make_tree, transfer

_numbers = itertools.count()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """What the driver needs to reach the running emulator."""
    with run_gcs(tmp_path_factory.mktemp("gcs"), "team") as arguments:
        yield arguments


@pytest.fixture
def store(arguments):
    return open_store("lake", f"gs://team/place-{next(_numbers)}", credentials=arguments)


@pytest.fixture
def made(tmp_path):
    """A directory that a step made."""
    return make_tree(tmp_path / "made")


def test_a_tree_goes_to_the_bucket_and_comes_back(store, made, tmp_path):
    stores = StoreSet([store], "lake")

    artifact = commit_output(store, "run/out", made, step_run="r")
    place = fetch(artifact, stores, blobs=BlobCache(tmp_path / "b"), target=tmp_path / "t")

    assert digest_tree(place).digest == artifact.digest == digest_tree(made).digest
    assert missing_artifacts([artifact], stores) == []
    version = pin_external(store, "run/out", how="version")
    store.write_bytes("run/out/a.txt", b"HELLO")
    assert pin_external(store, "run/out", how="version").digest != version.digest
    store.delete("run/out")
    assert "is gone" in missing_artifacts([artifact], stores)[0][1]


def test_a_second_commit_of_the_same_files_leaves_those_of_the_new_one_alone(store, made):
    first = commit_output(store, "run/out", made, step_run="r")
    (made / "large").unlink()
    again = commit_output(store, "run/out", made, step_run="r")
    assert (again.files, again.digest != first.digest) == (2, True)
    assert missing_artifacts([again], StoreSet([store], "lake")) == []


def test_files_are_uploaded_to_a_place_of_others(store, made):
    store.write_bytes("shared/theirs.txt", b"theirs")
    sent = upload_files(store, "shared", made, overwrite=False, step_run="r")
    assert sent.files == 4
    (made / "a.txt").write_text("other")
    with pytest.raises(DataError, match=r"holds \['a.txt'\] already"):
        upload_files(store, "shared", made, overwrite=False, step_run="s")
    assert store.read_bytes("shared/theirs.txt") == b"theirs"


def test_data_are_transferred_in_copied_within_the_store_and_out(store, made, tmp_path):
    local = open_store("local", f"file://{tmp_path}")
    digest = digest_tree(made).digest

    assert transfer(tmp_path, (local, "made"), (store, "copy")).digest == digest
    assert transfer(tmp_path, (store, "copy"), (store, "again")).size == (20 << 20) + 10
    assert transfer(tmp_path, (store, "again"), (local, "back")).digest == digest
    assert digest_tree(tmp_path / "back").digest == digest


def test_a_bucket_that_is_not_there_is_told_with_the_datastore(arguments):
    elsewhere = open_store("gone", "gs://no-such-bucket/x", credentials=arguments)
    with pytest.raises(DataError, match="datastore 'gone'"):
        elsewhere.exists("a.txt")
