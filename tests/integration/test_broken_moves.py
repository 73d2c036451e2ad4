"""What happens to a transfer between datastores when the connection or the worker breaks: on versitygw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from airflow_mlpipelines import DataReference, DataTransferStep, Pipeline, Workspace
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.parts import PART, THREADS
from airflow_mlpipelines.storage.stores import open_store
from airflow_mlpipelines.storage.transfer import pin_external
from airflow_mlpipelines.storage.trees import digest_tree
from tests.dags.conftest import airflow_db  # noqa: F401 - a fixture
from tests.dags.project import run_dag
from tests.integration.breaking_proxy import BreakingProxy
from tests.integration.test_broken_transfers import (  # noqa: F401 - fixtures
    S3_KEYS,
    SLACK,
    bucket,
    place,
    proxy,
    served,
    unfinished,
)

pytestmark = pytest.mark.s3

IN_FLIGHT = THREADS * PART
LARGE = 13 * PART + 12345
BREAK = 11 * PART


@pytest.fixture
def ends(served, place, proxy, bucket, tmp_path):  # noqa: F811
    """The addresses and options of three datastores, and the proxies before the two that are buckets.

    The source and the target of a transfer, each in two kinds, have proxies of their own. ``raw`` is on both sources.
    """
    (bucket / "team").mkdir()
    local = (f"file://{tmp_path}/local", {})
    (tmp_path / "local").mkdir()
    (tmp_path / "local/raw").write_bytes(os.urandom(LARGE))
    with BreakingProxy(proxy._target[1]) as second:
        url, options = place
        # A request whose connection is dropped at its first byte is noticed by this alone, and s3fs tries five times.
        options["config_kwargs"]["read_timeout"] = 10
        client = {**options["client_kwargs"], "endpoint_url": f"http://127.0.0.1:{second.port}"}
        from_bucket = (url, {**options, "client_kwargs": client})
        store = open_store("from", url, credentials=from_bucket[1])
        store.filesystem.put_file(str(tmp_path / "local/raw"), store.remote_path("raw"))
        second.heal()
        yield {
            "from": {"file": local, "s3": from_bucket},
            "to": {"file": local, "s3": (url, options)},
            "notes": (f"file://{tmp_path}/notes", {}),
            "proxies": {"from": second, "to": proxy},
            "bucket": bucket,
        }


WORK = """
    import json, sys, threading
    from pathlib import Path
    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.copying import Transfer
    from airflow_mlpipelines.storage.ends import open_end
    from airflow_mlpipelines.storage.journal import Journal
    from airflow_mlpipelines.storage.stores import open_store
    from airflow_mlpipelines.storage.transfer import pin_external

    words = json.loads(sys.argv[1])
    source, target, notes = (
        open_store(name, words[name][0], credentials=words[name][1])
        for name in ("from", "to", "notes")
    )
    ends = open_end(source, "raw"), open_end(target, "copy")
    artifact = pin_external(source, "raw", how="version")
    blobs, stop = BlobCache(Path(words["home"])), threading.Event()
    Transfer(artifact, *ends, Journal(notes, ends[0].uri, ends[1].uri), blobs, print, stop).run()
"""


def transfer(places, blobs):
    """Run a transfer of ``raw`` to ``copy``; return what has arrived and what its log says."""
    source, target, notes = (
        open_store(name, places[name][0], credentials=places[name][1])
        for name in ("from", "to", "notes")
    )
    both = open_end(source, "raw"), open_end(target, "copy")
    artifact = pin_external(source, "raw", how="version")
    lines = []
    journal = Journal(notes, both[0].uri, both[1].uri)
    run = Transfer(artifact, *both, journal, BlobCache(blobs), lines.append, threading.Event())
    return run.run(), lines


@pytest.mark.parametrize("how", ["connection", "process"])
@pytest.mark.parametrize("kinds", [("file", "s3"), ("s3", "file"), ("s3", "s3")], ids="-".join)
def test_a_large_file_that_broke_off_is_gone_on_with_by_a_second_worker(ends, tmp_path, kinds, how):
    places = {side: ends[side][kind] for side, kind in zip(("from", "to"), kinds, strict=True)}
    places["notes"] = ends["notes"]
    side, way = ("to", "up") if kinds[1] == "s3" else ("from", "down")
    broken, digest = ends["proxies"][side], digest_tree(tmp_path / "local/raw").digest
    for each in ends["proxies"].values():
        each.heal()
    broken.limit(way, BREAK, then="drop" if how == "connection" else "hold")
    if how == "connection":
        with pytest.raises(DataError, match=r"datastore '(from|to)'"):
            transfer(places, tmp_path / "first")
    else:
        words = json.dumps({**places, "home": str(tmp_path / "first")})
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORK), words])
        try:
            assert broken.reached.wait(120)
        finally:
            process.kill()
            assert process.wait() == -9
    passed = {name: (each.up, each.down) for name, each in ends["proxies"].items()}
    for each in ends["proxies"].values():
        each.heal()
    came = passed[side][way == "down"]
    assert came > BREAK - PART
    assert not open_store("to", places["to"][0], credentials=places["to"][1]).exists("copy")

    done, _ = transfer(places, tmp_path / "second")

    again = {name: (each.up, each.down) for name, each in ends["proxies"].items()}
    assert again[side][way == "down"] < LARGE - came + IN_FLIGHT + SLACK < LARGE
    if kinds == ("s3", "s3"):  # what is there is not even read again
        assert again["from"][1] < LARGE - came + IN_FLIGHT + SLACK
        assert done.digest.startswith("version:")
    else:
        assert done.digest == digest
    copy = ends["bucket"] / "team/copy" if kinds[1] == "s3" else tmp_path / "local/copy"
    assert digest_tree(copy).digest == digest
    assert sorted(file.name for file in (tmp_path / "local").iterdir() if "part" in file.name) == []
    if kinds[1] == "s3":
        assert unfinished(open_store("to", places["to"][0], credentials=places["to"][1])) == []


def test_parts_of_a_source_that_was_changed_meanwhile_are_not_put_together(ends, tmp_path):
    places = {"from": ends["from"]["s3"], "to": ends["to"]["s3"], "notes": ends["notes"]}
    ends["proxies"]["to"].heal()
    ends["proxies"]["to"].limit("up", BREAK, then="drop")
    with pytest.raises(DataError, match="datastore 'to'"):
        transfer(places, tmp_path / "first")
    ends["proxies"]["to"].heal()
    other = bytes(reversed((tmp_path / "local/raw").read_bytes()))
    source = open_store("from", places["from"][0], credentials=places["from"][1])
    source.filesystem.pipe_file(source.remote_path("raw"), other)

    transfer(places, tmp_path / "second")

    assert (ends["bucket"] / "team/copy").read_bytes() == other
    assert unfinished(source) == []


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_a_step_whose_connection_broke_goes_on_in_the_next_run_on_another_worker(
    ends, tmp_path, monkeypatch
):
    (tmp_path / "mlpipelines.yaml").write_text(
        "name: t\ndefault_datastore: here\ndatastores:\n  here: {url: data}\n  from: {url: local}\n"
        f"  to: {{url: 's3://{ends['bucket'].name}/team', conn_id: lake}}\n"
    )
    client = ends["to"]["s3"][1]["client_kwargs"]
    quick = {"config_kwargs": ends["to"]["s3"][1]["config_kwargs"]}
    connection = {"conn_type": "aws", "login": S3_KEYS[0], "password": S3_KEYS[1]}
    monkeypatch.setenv(
        "AIRFLOW_CONN_LAKE", json.dumps({**connection, "extra": {**client, **quick}})
    )
    broken = ends["proxies"]["to"]

    def run(worker):
        monkeypatch.setenv("MLPIPELINES_HOME", str(tmp_path / worker))
        ws = Workspace.from_config(tmp_path)
        raw = DataReference(ws.datastores["from"], "raw", "raw")
        copy = DataReference(ws.datastores["to"], "copy", "copy")
        step = DataTransferStep("move", raw, copy)
        return run_dag(Pipeline(ws, [step], name="broken_transfer").to_dag())

    broken.heal()
    broken.limit("up", BREAK, then="drop")
    failed = run("first")
    assert failed.steps == {"move": "failed"}
    assert "the transfer from datastore 'from'" in failed.reasons["move"]
    came = broken.up
    broken.heal()

    done = run("second")

    assert done.steps == {"move": "ran"}
    assert broken.up < LARGE - came + IN_FLIGHT + SLACK < LARGE
    assert (ends["bucket"] / "team/copy").read_bytes() == Path(tmp_path / "local/raw").read_bytes()
