"""Transfers to, from and within versitygw, an S3 server of its own process."""

from __future__ import annotations

import os
import threading
from collections import Counter

import pytest

from airflow_mlpipelines import DataReference, DataTransferStep, Pipeline, Workspace
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage import copying
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.stores import open_store
from airflow_mlpipelines.storage.transfer import pin_external
from airflow_mlpipelines.storage.trees import digest_tree
from tests.dags.conftest import airflow_db  # noqa: F401 - a fixture
from tests.dags.project import run_dag
from tests.integration.s3_server import (  # noqa: F401 - fixtures
    Bucket,
    blobs,
    bucket,
    make_connection,
    server,
    store,
)

pytestmark = pytest.mark.s3

FILES = {"a.txt": b"hello", "sub/grüße 🛫.txt": b"world", "large": os.urandom(40 << 20)}


@pytest.fixture
def local(tmp_path):
    """A datastore of files with a directory ``raw`` on it."""
    for name, data in FILES.items():
        file = tmp_path / "local" / "raw" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return open_store("local", f"file://{tmp_path}/local")


@pytest.fixture
def transfer(local, blobs):  # noqa: F811
    """Runs a transfer between two datastores."""

    def transfer(source, source_path, target, target_path, pin="version", stop=None):
        ends = open_end(source, source_path), open_end(target, target_path)
        artifact = pin_external(source, source_path, how=pin, blobs=blobs)
        journal = Journal(local, ends[0].uri, ends[1].uri)
        stop = stop or threading.Event()
        return Transfer(artifact, *ends, journal, blobs, lambda _: None, stop).run()

    return transfer


def test_a_tree_goes_to_the_bucket_and_comes_back(store, local, bucket, transfer, tmp_path):  # noqa: F811
    digest = digest_tree(tmp_path / "local/raw").digest

    assert transfer(local, "raw", store, "copy").digest == digest
    assert bucket.keys() == {f"team/copy/{name}" for name in FILES}
    assert bucket.get("team/copy/large") == FILES["large"]  # sent in parts

    assert transfer(store, "copy", local, "back").digest == digest
    assert digest_tree(tmp_path / "local/back").digest == digest


@pytest.mark.parametrize("pin", ["content", "version"])
def test_within_the_server_no_byte_passes_through_this_machine(store, bucket, transfer, pin):  # noqa: F811
    for name, data in FILES.items():
        bucket.put(f"team/raw/{name}", data)
    if pin == "content":  # read once, to plan
        pin_external(store, "raw")
    digest = pin_external(store, "raw").digest
    before = Counter(bucket.reads())

    done = transfer(store, "raw", store, "copy", pin=pin)

    planned = len(FILES) if pin == "content" else 0
    assert len(Counter(bucket.reads()) - before) == planned
    assert not any("team/copy" in key for key in bucket.reads())
    assert pin_external(store, "copy").digest == digest
    if pin == "content":
        assert done.digest == digest


def test_between_servers_users_it_is_streamed(server, store, bucket, transfer):  # noqa: F811
    bucket.put("team/raw/a.txt", b"hello")
    elsewhere = Bucket(server)
    other = open_store(
        "other", f"s3://{elsewhere.name}", credentials=server.credentials(anon=False)
    )

    transfer(store, "raw", other, "copy")

    assert elsewhere.get("copy/a.txt") == b"hello"
    assert bucket.reads() == {"team/raw/a.txt": 1}


def test_the_next_try_sends_what_the_first_did_not(server, store, local, bucket, transfer):  # noqa: F811
    stop = threading.Event()

    class Progress(copying.Progress):
        def add(self, *, files=0, size=0):
            if files:
                stop.set()  # after the first whole file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "Progress", Progress)
        patch.setattr(copying, "THREADS", 1)
        with pytest.raises(DataError, match="was stopped"):
            transfer(local, "raw", store, "copy", stop=stop)
    (arrived,) = bucket.keys()
    assert server.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", []) == []
    before = server.requests

    done = transfer(local, "raw", store, "copy")

    again = {path for operation, path in server.requests - before if "GetObject" not in operation}
    assert f"/{bucket.name}/{arrived}" not in {path for path in again if path.endswith(arrived)}
    assert bucket.keys() == {f"team/copy/{name}" for name in FILES}
    assert pin_external(store, "copy").digest == done.digest


def test_a_large_file_that_breaks_off_is_not_there(server, store, local, bucket, transfer):  # noqa: F811
    stop = threading.Event()

    class Progress(copying.Progress):
        def add(self, *, files=0, size=0):
            super().add(files=files, size=size)
            if self.passed > 30 << 20:
                stop.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "Progress", Progress)
        with pytest.raises(DataError, match="was stopped"):
            transfer(local, "raw/large", store, "copy", stop=stop)

    assert bucket.keys() == set()
    assert server.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", []) == []


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_a_step_of_a_run_moves_a_bucket_and_fails_with_both_ends_named(
    server,  # noqa: F811
    bucket,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", make_connection(server))
    bucket.put("team/raw/a.txt", b"hello")

    def run(target):
        (tmp_path / "mlpipelines.yaml").write_text(
            "name: t\ndefault_datastore: here\ndatastores:\n  here: {url: data}\n"
            f"  lake: {{url: 's3://{bucket.name}/team', conn_id: lake}}\n"
            f"  other: {{url: 's3://{target}', conn_id: lake}}\n"
        )
        ws = Workspace.from_config(tmp_path)
        raw = DataReference(ws.datastores["lake"], "raw", "raw")
        copy = DataReference(ws.datastores["other"], "copy", "copy")
        step = DataTransferStep("move", raw, copy)
        return run_dag(Pipeline(ws, [step], name=f"s3_transfer_{bucket.name[-1]}").to_dag())

    failed = run("no-such-bucket")
    assert failed.steps == {"move": "failed"}
    assert "datastore 'lake' (s3://" in failed.reasons["move"]
    assert "datastore 'other' (s3://no-such-bucket/copy) failed" in failed.reasons["move"]

    done = run(Bucket(server).name)
    assert done.steps == {"move": "ran"}
