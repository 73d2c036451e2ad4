"""Datastores on Azurite, Microsoft's emulator of Azure Storage."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.connections import open_datastore
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import (
    commit_output,
    fetch,
    missing_artifacts,
    pin_external,
)
from airflow_mlpipelines.storage.trees import digest_tree
from tests.parts import missing

pytestmark = pytest.mark.azure

# The account that every Azurite has, and its key, are public.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_numbers = itertools.count()


def find_azurite():
    """Return the program, as ``.ci/azurite.sh`` leaves it or as it is on the PATH."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlpipelines-tests"
    installed = sorted(caches.glob("azurite-*/node_modules/.bin/azurite-blob"))
    return str(installed[-1]) if installed else shutil.which("azurite-blob")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """The address of a running Azurite."""
    program = find_azurite()
    if program is None:
        missing(
            "no azurite-blob: .ci/azurite.sh installs it, or npm install azurite puts it on the PATH"
        )
    if find_spec("adlfs") is None:
        missing("no adlfs: pip install 'airflow-mlpipelines[azure]'")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    directory = tmp_path_factory.mktemp("azurite")
    words = [
        "--blobPort",
        str(port),
        "--location",
        str(directory),
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
    ]
    process = subprocess.Popen([program, *words], start_new_session=True)
    try:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture
def connect(endpoint, monkeypatch):
    """Opens a container of its own with an Airflow connection."""
    container = f"container-{next(_numbers)}"

    def connect(key=KEY):
        text = (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};"
            f"BlobEndpoint={endpoint};"
        )
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
    root = tmp_path / "made"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("hello")
    (root / "sub" / "grüße 🛫.txt").write_text("world")
    (root / "large").write_bytes(os.urandom(20 << 20))
    return root


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

    def transfer(source, path, target_path):
        ends = open_end(source, path), open_end(store, target_path)
        journal = Journal(local, path, target_path)
        artifact = pin_external(source, path, how="version")
        run = Transfer(
            artifact, *ends, journal, BlobCache(tmp_path / "b"), print, threading.Event()
        )
        return run.run()

    assert transfer(local, "made", "copy").digest == digest
    assert transfer(store, "copy", "again").size == (20 << 20) + 10
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
