"""Datastores on a real SFTP server, with the credentials of Airflow's SFTP connections."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest

from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.connections import open_datastore
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import PART_SUFFIX, StoreSet
from airflow_mlpipelines.storage.transfer import (
    commit_output,
    fetch,
    missing_artifacts,
    pin_external,
)
from airflow_mlpipelines.storage.trees import digest_tree
from airflow_mlpipelines.storage.uploads import upload_files
from tests.parts import missing


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    try:
        from tests.integration.sftp_server import running_server
    except ImportError:
        missing("no paramiko: pip install 'airflow-mlpipelines[sftp]'")
    root = tmp_path_factory.mktemp("sftp")
    with running_server(root) as server:
        yield server


@pytest.fixture
def connect(server, monkeypatch, tmp_path):
    """Opens the datastore with an Airflow connection that has these fields."""

    def connect(extra=None, **fields):
        connection = {"conn_type": "sftp", "login": "worker", "port": server.port, **fields}
        connection["extra"] = extra or {}
        monkeypatch.setenv("AIRFLOW_CONN_FTP", json.dumps(connection))
        url = f"sftp://127.0.0.1/{tmp_path.name}"
        return open_datastore(DatastoreSpec(name="ftp", url=url, conn_id="ftp"))

    return connect


@pytest.fixture
def store(connect):
    return connect(password="p4ss-of-the-worker")


def test_a_tree_goes_to_the_server_and_comes_back(store, server, tmp_path):
    source = tmp_path / "made"
    for number in range(30):  # more than are sent at once
        file = source / f"sub {number % 3}" / f"grüße {number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"hello {number}" * number)
    stores = StoreSet([store], "ftp")

    artifact = commit_output(store, "run/out", source, step_run="r")
    place = fetch(artifact, stores, blobs=BlobCache(tmp_path / "b"), target=tmp_path / "t")

    assert digest_tree(place).digest == artifact.digest == digest_tree(source).digest
    assert digest_tree(server.root / tmp_path.name / "run/out").digest == artifact.digest
    assert missing_artifacts([artifact], stores) == []
    store.delete("run/out")
    assert "is gone" in missing_artifacts([artifact], stores)[0][1]


def test_files_are_written_whole_and_replaced(store, server, tmp_path):
    store.write_bytes("deep/er/a.txt", b"one")
    store.write_bytes("deep/er/a.txt", b"two")

    assert store.read_bytes("deep/er/a.txt") == b"two"
    assert list(server.root.rglob(f"*{PART_SUFFIX}")) == []
    assert pin_external(store, "deep", how="version").digest.startswith("version:")
    assert pin_external(store, "nothing") is None


def test_two_files_of_one_time_and_one_size_are_not_taken_for_each_other(store, server, tmp_path):
    for name in ("a", "b", "deep/a", "deep/b"):
        file = server.root / tmp_path.name / f"{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        os.utime(file, (10**9, 10**9))  # as rsync leaves them
    blobs, stores = BlobCache(tmp_path / "b"), StoreSet([store], "ftp")

    pinned = [pin_external(store, f"{name}.csv", how="version") for name in "ab"]
    got = [
        fetch(artifact, stores, blobs=blobs, target=tmp_path / f"t{number}").read_text()
        for number, artifact in enumerate(pinned)
    ]

    assert pinned[0].digest != pinned[1].digest  # which steps are reused by
    assert got == ["a", "b"]
    assert pin_external(store, "a.csv", how="version") == pinned[0]


def test_data_that_a_step_opens_by_itself_are_read_to_plan_and_kept_nowhere(
    store, server, tmp_path
):
    file = server.root / tmp_path.name / "raw.bin"
    file.parent.mkdir()
    file.write_bytes(os.urandom(9 << 20))

    pinned = pin_external(store, "raw.bin", blobs=BlobCache(tmp_path / "b"), keep=False)

    assert pinned.digest == digest_tree(file).digest
    assert not list((tmp_path / "b").rglob("*/blob"))
    assert pin_external(store, "raw.bin").digest == pinned.digest


def test_files_of_an_output_that_are_there_are_not_sent_again_after_a_break(
    store, server, tmp_path
):
    (tmp_path / "made").mkdir()
    names = [f"{number:02d}.txt" for number in range(30)]
    for name in names:
        (tmp_path / "made" / name).write_text(f"hello {name}")
    there = server.root / tmp_path.name / "run/out"
    in_the_way = there / names[-1] / "a directory where a file shall be"
    in_the_way.mkdir(parents=True)
    in_the_way.joinpath("full").write_text("x")
    os.chmod(there, 0o755)
    with pytest.raises(DataError, match="datastore 'ftp'"):
        commit_output(store, "run/out", tmp_path / "made", step_run="r")
    shutil.rmtree(there / names[-1])
    sent = {file.name: file.stat().st_ino for file in there.glob("*.txt")}
    assert len(sent) > 10
    (tmp_path / "made" / "03.txt").write_text("HELLO 03.txt")  # as long: the program has run again

    artifact = commit_output(store, "run/out", tmp_path / "made", step_run="r")

    again = {file.name: file.stat().st_ino for file in there.glob("*.txt")}
    assert {name for name in sent if again[name] != sent[name]} == {"03.txt"}
    assert digest_tree(there).digest == artifact.digest == digest_tree(tmp_path / "made").digest
    assert [file.name for file in tmp_path.iterdir() if "sent" in file.name] == []


def test_files_that_a_first_try_has_uploaded_are_no_conflict_and_others_are(store, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/model").write_bytes(b"x" * 10_000_000)
    send = {"overwrite": False, "step_run": "r"}
    first = upload_files(store, "place", tmp_path / "made", **send)

    assert upload_files(store, "place", tmp_path / "made", **send) == first
    (tmp_path / "made/model").write_bytes(b"y" * 10_000_000)
    with pytest.raises(DataError, match=r"holds \['model'\] already"):
        upload_files(store, "place", tmp_path / "made", **send)


def test_a_private_key_and_the_servers_key_are_taken_from_the_connection(connect, server):
    text = io.StringIO()
    server.user_key.write_private_key(text)
    host_key = f"ssh-rsa {server.host_key.get_base64()}"

    store = connect({"private_key": text.getvalue(), "host_key": host_key})

    assert not store.exists("a.txt")
    other = f"ssh-rsa {server.user_key.get_base64()}"
    with pytest.raises(DataError, match="shows a key that is not known"):
        connect({"private_key": text.getvalue(), "host_key": other})


def test_a_wrong_password_is_an_error_that_names_the_datastore_and_no_secret(connect):
    with pytest.raises(DataError, match=r"datastore 'ftp'.* can't be opened") as caught:
        connect(password="not-the-password")

    assert "not-the-password" not in str(caught.value)
    with pytest.raises(DataError, match="a field of the Airflow connection 'ftp' can't be read"):
        connect({"private_key": "no key at all"})
