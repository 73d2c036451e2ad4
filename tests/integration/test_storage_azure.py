"""Datastores on Azurite, Microsoft's emulator of Azure Storage."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta

import pytest

from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.connections import open_datastore
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.parts import PART, THREADS
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import (
    commit_output,
    fetch,
    missing_artifacts,
    pin_external,
)
from airflow_mlpipelines.storage.trees import digest_tree
from airflow_mlpipelines.storage.uploads import upload_files
from tests.integration.azurite_server import ACCOUNT, KEY, connection_string, run_azurite
from tests.integration.breaking_proxy import BreakingProxy
from tests.integration.moving import make_tree, transfer
from tests.integration.test_broken_moves import WORK
from tests.integration.test_broken_moves import transfer as move
from tests.integration.test_broken_transfers import kill_in_the_middle

pytestmark = pytest.mark.azure

LARGE = 13 * PART + 12345
BREAK = 11 * PART
SLACK = 2 << 20  # what HTTP and the listings add
_numbers = itertools.count()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a running Azurite."""
    with run_azurite(tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture
def connect(port, monkeypatch):
    """Opens a container of its own with an Airflow connection."""
    container = f"container-{next(_numbers)}"

    def connect(key=KEY, sas=None, through=None):
        text = connection_string(through or port, key, sas)
        connection = {"conn_type": "wasb", "extra": {"connection_string": text}}
        monkeypatch.setenv("AIRFLOW_CONN_BLOBS", json.dumps(connection))
        spec = DatastoreSpec(name="blobs", url=f"abfs://{container}/team", conn_id="blobs")
        return open_datastore(spec)

    connect().filesystem.mkdir(container)
    return connect


@pytest.fixture
def store(connect):
    return connect()


@pytest.fixture
def made(tmp_path):
    """A directory that a step made."""
    return make_tree(tmp_path / "made")


def test_a_tree_goes_to_the_container_and_comes_back(store, made, tmp_path):
    stores = StoreSet([store], "blobs")

    artifact = commit_output(store, "run/out", made, step_run="r")
    place = fetch(artifact, stores, blobs=BlobCache(tmp_path / "b"), target=tmp_path / "t")

    assert digest_tree(place).digest == artifact.digest == digest_tree(made).digest
    assert missing_artifacts([artifact], stores) == []
    version = pin_external(store, "run/out", how="version")
    store.write_bytes("run/out/a.txt", b"HELLO")
    assert pin_external(store, "run/out", how="version").digest != version.digest
    store.delete("run/out")
    assert "is gone" in missing_artifacts([artifact], stores)[0][1]


def test_data_are_transferred_in_and_copied_within_the_store(store, made, tmp_path):
    local = open_store("local", f"file://{tmp_path}")
    digest = digest_tree(made).digest

    assert transfer(tmp_path, (local, "made"), (store, "copy")).digest == digest
    again = transfer(tmp_path, (store, "copy"), (store, "again"))
    assert again.size == (20 << 20) + 10
    assert pin_external(store, "again").digest == digest


def test_a_wrong_key_and_a_missing_container_name_the_datastore_and_no_secret(connect, store):
    wrong = connect("d3Jvbmcga2V5IGZvciB0aGlzIGFjY291bnQgd3Jvbmc=")
    with pytest.raises(DataError, match="datastore 'blobs'") as caught:
        wrong.read_bytes("a.txt")
    assert KEY not in str(caught.value)

    elsewhere = open_store(
        "gone", "abfs://no-such-container/x", credentials=store.filesystem.storage_options
    )
    with pytest.raises(DataError, match="datastore 'gone'"):
        elsewhere.exists("a.txt")


def test_a_shared_access_signature_will_do(connect, store, port, made, tmp_path):
    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    sas = generate_account_sas(
        ACCOUNT,
        KEY,
        ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, create=True, add=True),
        datetime.now(UTC) + timedelta(hours=1),
    )
    signed = connect(sas=sas)

    artifact = commit_output(signed, "run/out", made, step_run="r")
    transfer(tmp_path, (signed, "run/out"), (signed, "copy"))

    assert pin_external(store, "copy").digest == artifact.digest
    wrong = connect(sas=sas.replace("sig=", "sig=a"))
    with pytest.raises(DataError, match="datastore 'blobs'"):
        wrong.read_bytes("run/out/a.txt")


def test_the_second_step_on_a_machine_fetches_nothing(connect, port, made, tmp_path):
    with BreakingProxy(port) as proxy:
        stores = StoreSet([connect(through=proxy.port)], "blobs")
        artifact = commit_output(stores.default, "run/out", made, step_run="r")
        blobs = BlobCache(tmp_path / "b")
        proxy.heal()
        fetch(artifact, stores, blobs=blobs, target=tmp_path / "t1")
        assert proxy.down > 20 << 20
        proxy.heal()

        place = fetch(artifact, stores, blobs=blobs, target=tmp_path / "t2")

        assert proxy.down == 0
        assert digest_tree(place).digest == artifact.digest


def test_files_go_to_a_place_of_others_and_are_no_conflict_the_second_time(store, made):
    store.write_bytes("place/theirs.txt", b"theirs")
    send = {"overwrite": False, "step_run": "r"}

    first = upload_files(store, "place", made, **send)

    assert first.files == 4
    assert upload_files(store, "place", made, **send) == first
    (made / "a.txt").write_text("HELLO")
    with pytest.raises(DataError, match=r"holds \['a.txt'\] already"):
        upload_files(store, "place", made, **send)
    assert store.read_bytes("place/theirs.txt") == b"theirs"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_large_file_goes_on_after_its_worker_was_killed(connect, store, port, tmp_path, way):
    (tmp_path / "local").mkdir()
    raw = tmp_path / "local/raw"
    raw.write_bytes(os.urandom(LARGE))
    digest = digest_tree(raw).digest
    local = (f"file://{tmp_path}/local", {})
    if way == "down":
        store.filesystem.put_file(str(raw), store.remote_path("raw"))
    with BreakingProxy(port) as proxy:
        lake = connect(through=proxy.port)
        there = (lake.url, {"connection_string": connection_string(proxy.port)})
        places = {"from": local, "to": there} if way == "up" else {"from": there, "to": local}
        places["notes"] = (f"file://{tmp_path}/notes", {})
        proxy.heal()
        proxy.limit(way, BREAK, then="hold")
        words = json.dumps({**places, "home": str(tmp_path / "first")})
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORK), words])
        try:
            assert proxy.reached.wait(120)
        finally:
            process.kill()
            assert process.wait() == -9
        came = getattr(proxy, way)
        proxy.heal()
        assert not store.exists("copy")

        done, _ = move(places, tmp_path / "second")

        assert getattr(proxy, way) < LARGE - came + THREADS * PART + SLACK < LARGE
    assert done.digest == digest
    copy = store if way == "up" else open_store("local", local[0])
    assert pin_external(copy, "copy").digest == digest


def test_an_output_goes_on_after_its_worker_was_killed(connect, store, port, tmp_path):
    made = tmp_path / "model.bin"
    made.write_bytes(os.urandom(LARGE))
    with BreakingProxy(port) as proxy:
        lake = connect(through=proxy.port)
        place = (lake.url, {"connection_string": connection_string(proxy.port)})
        came = kill_in_the_middle(proxy, place, tmp_path, way="up", after=BREAK, source=made)
        assert not store.exists("run/out")

        artifact = commit_output(lake, "run/out", made, step_run="r")

        assert proxy.up < LARGE - came + THREADS * PART + SLACK < LARGE
        assert pin_external(store, "run/out").digest == artifact.digest == digest_tree(made).digest
        proxy.heal()
        assert commit_output(lake, "run/other", made, step_run="r").digest == artifact.digest
        assert proxy.up > LARGE
