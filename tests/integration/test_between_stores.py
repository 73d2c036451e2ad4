"""Between datastores of different kinds: versitygw, Azurite, an SFTP server and a directory, in transfers and in a run."""

# ruff: noqa: F811 - fixtures are arguments of the names that they are imported under
from __future__ import annotations

import itertools
import json
import os
import threading

import pytest

from airflow_mlpipelines import (
    CommandStep,
    DataReference,
    DataTransferStep,
    Pipeline,
    PipelineData,
    Workspace,
)
from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.operators.connections import open_datastore
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.sending import LARGE
from airflow_mlpipelines.storage.stores import PART_SUFFIX, open_store
from airflow_mlpipelines.storage.transfer import pin_external
from airflow_mlpipelines.storage.trees import digest_tree
from tests.dags.conftest import airflow_db  # noqa: F401 - a fixture
from tests.dags.project import run_dag
from tests.integration.azurite_server import connection_string, run_azurite
from tests.integration.s3_server import Bucket, make_connection, server  # noqa: F401 - a fixture
from tests.parts import missing

pytestmark = [pytest.mark.s3, pytest.mark.azure]


@pytest.fixture(scope="module")
def sftp(tmp_path_factory):
    try:
        from tests.integration.sftp_server import running_server
    except ImportError:
        missing("no paramiko: pip install 'airflow-mlpipelines[sftp]'")
    with running_server(tmp_path_factory.mktemp("sftp")) as running:
        yield running


@pytest.fixture(scope="module")
def azurite(tmp_path_factory):
    with run_azurite(tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture
def urls(server, azurite, sftp, tmp_path, monkeypatch):
    """The url of each datastore; each has its Airflow connection, by its name."""
    container = f"container-{tmp_path.name.replace('_', '-')}"[-60:]
    blobs = {"conn_type": "wasb", "extra": {"connection_string": connection_string(azurite)}}
    ftp = {"conn_type": "sftp", "login": "worker", "password": "p4ss-of-the-worker"}
    connections = {
        "S3": make_connection(server),
        "AZURE": json.dumps(blobs),
        "SFTP": json.dumps({**ftp, "port": sftp.port}),
    }
    for name, value in connections.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", value)
    urls = {
        "s3": f"s3://{Bucket(server).name}/team",
        "azure": f"abfs://{container}/team",
        "sftp": f"sftp://127.0.0.1/{tmp_path.name}",
        "local": f"file://{tmp_path}/local",
    }
    open_one("azure", urls["azure"]).filesystem.mkdir(container)
    return urls


def open_one(name, url):
    spec = DatastoreSpec(name=name, url=url, conn_id=None if name == "local" else name)
    return open_datastore(spec)


@pytest.mark.parametrize(
    "way",
    [
        ("local", "s3", "azure", "s3", "local"),
        ("local", "azure", "local"),
        ("local", "s3", "sftp", "azure", "sftp", "s3", "local"),
    ],
    ids="-".join,
)
def test_a_tree_goes_from_store_to_store_and_comes_back_bit_by_bit(urls, way, tmp_path):
    raw = tmp_path / "local" / "0"
    (raw / "sub").mkdir(parents=True)
    (raw / "sub" / "grüße 🛫.txt").write_bytes(b"hello")
    (raw / "empty").write_bytes(b"")
    (raw / "large").write_bytes(os.urandom(LARGE + 1 if "sftp" not in way else 9_000_001))
    notes = open_store("notes", f"file://{tmp_path}/notes")

    for number, (source, target) in enumerate(itertools.pairwise(way)):
        ends = (
            open_end(open_one(source, urls[source]), str(number)),
            open_end(open_one(target, urls[target]), str(number + 1)),
        )
        artifact = pin_external(ends[0].store, ends[0].path, how="version")
        journal = Journal(notes, ends[0].uri, ends[1].uri)
        blobs = BlobCache(tmp_path / "blobs")
        run = Transfer(artifact, *ends, journal, blobs, lambda _: None, threading.Event())

        assert run.run().digest == digest_tree(raw).digest

    assert digest_tree(tmp_path / "local" / str(len(way) - 1)).digest == digest_tree(raw).digest
    assert list((tmp_path / "local").rglob(f"*{PART_SUFFIX}")) == []


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_steps_read_and_write_stores_of_different_kinds(urls, sftp, tmp_path):
    (tmp_path / "mlpipelines.yaml").write_text(
        "name: t\ndefault_datastore: here\ndatastores:\n  here: {url: data}\n"
        + "".join(
            f"  {name}: {{url: '{urls[name]}', conn_id: {name}}}\n"
            for name in ("s3", "azure", "sftp")
        )
    )
    theirs = sftp.root / tmp_path.name / "exports"
    theirs.mkdir(parents=True)
    (theirs / "words.txt").write_text("one two\n")

    def run():
        ws = Workspace.from_config(tmp_path)
        stores = ws.datastores
        raw = DataReference(stores["sftp"], "raw", "exports")
        upper = PipelineData("upper", datastore=stores["azure"])
        final = PipelineData("final", datastore=stores["sftp"])
        lake = DataReference(stores["s3"], "lake", "copy")
        steps = [
            CommandStep(
                ["sh", "-c", f"tr a-z A-Z < {raw}/words.txt > {upper}"],
                name="upper",
                inputs=[raw],
                outputs=[upper],
            ),
            CommandStep(
                ["sh", "-c", f"mkdir {final}; tr ' ' '\\n' < {upper} > {final}/words.txt"],
                name="final",
                inputs=[upper],
                outputs=[final],
            ),
            DataTransferStep("move", final, lake),
        ]
        return run_dag(Pipeline(ws, steps, name="many_stores").to_dag())

    done = run()

    assert done.steps == {"upper": "ran", "final": "ran", "move": "ran"}
    assert done.outputs["upper"]["upper"]["uri"].startswith("abfs://")
    written = done.outputs["final"]["final"]["uri"].partition(tmp_path.name)[2]
    assert (sftp.root / f"{tmp_path.name}{written}/words.txt").read_text() == "ONE\nTWO\n"
    assert open_one("s3", urls["s3"]).read_bytes("copy/words.txt") == b"ONE\nTWO\n"
    assert set(run().steps.values()) == {"reused"}
