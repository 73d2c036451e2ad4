"""Datastores on a real web server, from which can only be read."""

from __future__ import annotations

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from airflow_mlpipelines import CommandStep, DataReference, Pipeline, PipelineData, Workspace
from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.exceptions import DataError, PipelineCheckError
from airflow_mlpipelines.operators.connections import open_datastore
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import fetch, pin_external
from tests.parts import missing

AUTHORIZATION = "Basic d29ya2VyOnNlY3JldA=="  # worker:secret


class Handler(SimpleHTTPRequestHandler):
    """Files of a directory, for one user; it knows no ranges, as many servers don't."""

    def send_head(self):
        if self.headers.get("Authorization") != AUTHORIZATION:
            self.send_error(401)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    """The directory of a server, and its URL."""
    for module in ("aiohttp", "requests"):
        try:
            __import__(module)
        except ImportError:
            missing(f"no {module}: pip install 'airflow-mlpipelines[http]'")
    root = tmp_path / "site"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield root, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def store(site, monkeypatch):
    connection = {"conn_type": "http", "login": "worker", "password": "secret"}
    monkeypatch.setenv("AIRFLOW_CONN_WEB", json.dumps(connection))
    return open_datastore(DatastoreSpec(name="web", url=site[1], conn_id="web"))


def test_a_file_is_read_and_known_by_what_the_server_tells(store, site, tmp_path):
    (site[0] / "flüge.csv").write_text("1,2\n" * 10)

    pinned = pin_external(store, "flüge.csv")
    place = fetch(
        pinned, StoreSet([store], "web"), blobs=BlobCache(tmp_path / "b"), target=tmp_path / "t"
    )

    assert (pinned.kind, pinned.size) == ("file", 40)
    assert place.read_text() == "1,2\n" * 10
    assert pin_external(store, "nothing.csv") is None
    version = pin_external(store, "flüge.csv", how="version")
    (site[0] / "flüge.csv").write_text("1,2\n" * 11)
    assert pin_external(store, "flüge.csv", how="version") != version


def test_a_large_file_is_transferred_from_a_server_that_knows_no_ranges(store, site, tmp_path):
    (site[0] / "large").write_bytes(b"x" * (20 << 20))
    local = open_store("local", f"file://{tmp_path}/local")
    ends = open_end(store, "large"), open_end(local, "copy")
    artifact = pin_external(store, "large", how="version")

    journal, blobs = Journal(local, "a", "b"), BlobCache(tmp_path / "b")
    done = Transfer(artifact, *ends, journal, blobs, print, threading.Event()).run()

    assert (tmp_path / "local/copy").stat().st_size == done.size == 20 << 20


def test_without_the_right_credentials_the_error_names_the_datastore(site):
    (site[0] / "a.csv").write_text("1")

    with pytest.raises(DataError, match="datastore 'web'"):
        open_store("web", site[1]).read_bytes("a.csv")


def test_nothing_goes_to_a_web_server_and_that_is_said_when_it_is_defined(tmp_path):
    def define(default):
        (tmp_path / "mlpipelines.yaml").write_text(
            f"name: t\ndefault_datastore: {default}\n"
            "datastores:\n  here: {url: data}\n  web: {url: 'https://example.org/data'}\n"
        )
        ws = Workspace.from_config(tmp_path)
        table = PipelineData("table", datastore=ws.datastores["web"])
        raw = DataReference(ws.datastores["web"], "raw", "raw.csv")
        return Pipeline(ws, [CommandStep(["cp", raw, table], inputs=[raw], outputs=[table])]).graph

    with pytest.raises(
        PipelineCheckError, match=r"output 'table': goes to datastore 'web' \(https:"
    ):
        define("here")
    with pytest.raises(PipelineCheckError, match=r"default datastore 'web' .* can only be read"):
        define("web")
