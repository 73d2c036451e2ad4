"""The agent without a cluster: its job document, and what it does in a workspace."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import uuid
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.agent import __main__ as command_line
from airflow_mlpipelines.agent.committing import commit
from airflow_mlpipelines.agent.job import Job, WantedInput, WantedOutput, describe_all
from airflow_mlpipelines.agent.staging import stage
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.portable import describe_store
from airflow_mlpipelines.storage.snapshots import make_snapshot
from airflow_mlpipelines.storage.stores import Store, open_store
from airflow_mlpipelines.storage.transfer import pin_external

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO


@pytest.fixture
def store() -> Store:
    return open_store("lake", f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A pod's workspace, with what the worker sends."""
    for name in ("code/outputs", "code/logs", "inputs", "outputs", "run", "control"):
        (tmp_path / "mlp" / name).mkdir(parents=True)
    return tmp_path / "mlp"


def make_job(store: Store, **fields) -> Job:
    datastores = {store.name: {"name": store.name, "url": store.url, "arguments": {}}}
    return Job(release="0", step="train", step_run="mlp-1", datastores=datastores, **fields)


def pin(store: Store, path: str, data: bytes = b"a,b\n"):
    store.write_bytes(path, data)
    return pin_external(store, path)


def run_stage(job: Job, workspace: Path, packed: Path | None = None) -> list[str]:
    lines: list[str] = []
    private = workspace / "control" / "agent"
    stage(job, workspace, say=lines.append, private=private, packed=packed)
    return lines


# ---- the document --------------------------------------------------------------------------------


def test_a_job_comes_through_its_document_unchanged(store):
    job = make_job(
        store,
        snapshot=("lake", "ab" * 32),
        inputs={"raw": WantedInput(pin(store, "raw.csv"), "raw/raw.csv")},
        outputs={"model": WantedOutput("lake", "run/model", "model", is_directory=True)},
        links={"raw": ("data/raw.csv", "/mlp/inputs/raw/raw.csv")},
        kept=("lake", "run/_run"),
    )
    assert Job.from_json(job.to_json(), release="0") == job


def test_a_document_of_another_version_names_both_releases(store):
    data = {**json.loads(make_job(store).to_json()), "version": 2, "release": "9.0"}
    with pytest.raises(DataError, match=r"worker's .* 9\.0 .*version 2.*has 0\.1\.0.*Build"):
        Job.from_json(json.dumps(data), release="0.1.0")


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"version": 1, "release": "0", "secret": "canary"}']
)
def test_a_damaged_document_is_refused_without_showing_it(damage):
    with pytest.raises(DataError, match="can't be read") as failure:
        Job.from_json(damage, release="0")
    assert "canary" not in str(failure.value)


def test_a_job_does_not_show_its_credentials(store):
    job = make_job(store)
    job.datastores["lake"]["arguments"]["secret"] = "canary"
    assert "canary" not in repr(job)


# ---- which datastores ----------------------------------------------------------------------------


def test_a_datastore_is_described_with_all_that_opens_it_elsewhere():
    pytest.importorskip("s3fs")
    arguments = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": "http://s3"}}
    store = open_store("lake", "s3://b/x", options={"anon": False}, credentials=arguments)
    description = describe_store(store)
    assert description == {
        "name": "lake",
        "url": "s3://b/x",
        "arguments": {"anon": False, **arguments},
    }
    assert json.loads(json.dumps(description)) == description


def test_what_only_this_machine_can_open_is_left_to_the_worker(tmp_path):
    pytest.importorskip("s3fs")
    key_file = tmp_path / "key.pem"
    key_file.write_text("key")
    tied = {"client_kwargs": {"verify": str(key_file)}}
    stores = [
        open_store("disk", f"file://{tmp_path}"),
        open_store("memory", "memory://x"),
        open_store("file", "s3://b", credentials=tied),
        open_store("object", "s3://b", credentials={"session": object()}),
    ]
    assert [describe_store(store) for store in stores] == [None] * 4
    with pytest.raises(DataError, match="'disk' can only be opened on the worker"):
        describe_all({"disk": stores[0]})


# ---- staging -------------------------------------------------------------------------------------


def test_code_and_inputs_are_put_to_what_the_worker_sends(store, workspace, tmp_path):
    (tmp_path / "source" / "logs").mkdir(parents=True)
    (tmp_path / "source" / "main.py").write_text("print()")
    snapshot = make_snapshot(tmp_path / "source", store)
    job = make_job(
        store,
        snapshot=("lake", snapshot.digest),
        inputs={"raw": WantedInput(pin(store, "d/raw.csv"), "raw/raw.csv")},
        links={"raw": ("data/x.csv", "/mlp/inputs/raw/raw.csv")},
    )
    worker = threading.Timer(0.3, (workspace / "control" / "staged").touch)
    worker.start()
    lines = run_stage(job, workspace)
    worker.join()
    assert (workspace / "inputs/raw/raw.csv").read_bytes() == b"a,b\n"
    assert (workspace / "code/main.py").read_text() == "print()"
    assert os.readlink(workspace / "code/data/x.csv") == "/mlp/inputs/raw/raw.csv"
    assert (workspace / "code/outputs").is_dir()
    assert not (workspace / "control" / "agent").exists()
    assert lines[0].startswith("Fetching input 'raw': 4 B in 1 file(s)")


def test_nothing_is_put_in_place_before_the_worker_has_sent_its_part(store, workspace):
    job = make_job(store, inputs={"raw": WantedInput(pin(store, "raw.csv"), "raw/raw.csv")})
    waiting = threading.Thread(target=run_stage, args=(job, workspace), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert not (workspace / "inputs" / "raw").exists()
    (workspace / "control" / "staged").touch()
    waiting.join(30)
    assert (workspace / "inputs" / "raw" / "raw.csv").exists()


def test_what_the_worker_has_packed_is_taken_without_it(store, workspace, tmp_path):
    packed, own = tmp_path / "files.tar.gz", tmp_path / "own"
    (own / "runtime").mkdir(parents=True)
    (own / "runtime" / "run.py").write_text("new")
    (own / "inputs").mkdir()
    with tarfile.open(packed, "w:gz") as archive:
        for name in ("runtime", "inputs"):
            archive.add(own / name, name)
    job = make_job(store, inputs={"raw": WantedInput(pin(store, "raw.csv"), "raw/raw.csv")})
    for _ in range(2):  # a node that was restarted runs the container again
        (workspace / "runtime").mkdir(exist_ok=True)
        (workspace / "runtime" / "left.py").touch()
        run_stage(job, workspace, packed)
        assert [file.name for file in (workspace / "runtime").iterdir()] == ["run.py"]
        assert (workspace / "inputs" / "raw" / "raw.csv").exists()


def test_packed_files_that_are_damaged_are_told_of(store, workspace, tmp_path):
    packed = tmp_path / "files.tar.gz"
    packed.write_bytes(gzip.compress(b"no archive at all")[:-4])
    with pytest.raises(DataError, match=r"files\.tar\.gz, can't be unpacked"):
        run_stage(make_job(store), workspace, packed)


def test_a_pod_that_no_worker_asks_for_ends(store, workspace, monkeypatch):
    monkeypatch.setattr("airflow_mlpipelines.agent.staging._CONTACT_SECONDS", 0.1)
    with pytest.raises(DataError, match="no worker has asked"):
        run_stage(make_job(store), workspace)


def test_a_link_where_the_step_has_a_file_names_the_input(store, workspace, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "data").write_text("own")
    job = make_job(
        store,
        snapshot=("lake", make_snapshot(tmp_path / "source", store).digest),
        links={"raw": ("data", "/mlp/inputs/raw")},
    )
    (workspace / "control" / "staged").touch()
    with pytest.raises(DataError, match=r"step 'train', input 'raw': path_on_compute is 'data'"):
        run_stage(job, workspace)


# ---- committing ----------------------------------------------------------------------------------


def test_what_is_committed_once_is_only_told_again(store, workspace):
    job = make_job(store, outputs={"model": WantedOutput("lake", "run/model", "model")})
    (workspace / "outputs" / "model").write_text("first")
    first = commit(job, workspace, say=print)
    store.delete("run/model")
    assert commit(job, workspace, say=print) == first
    assert not store.exists("run/model")
    assert first["model"]["size"] == 5


def test_a_step_that_failed_keeps_its_files_and_commits_nothing(store, workspace):
    outputs = {"model": WantedOutput("lake", "run/model", "model")}
    job = make_job(store, outputs=outputs, kept=("lake", "run/_run"))
    (workspace / "outputs" / "model").write_text("half")
    (workspace / "code/outputs/deep").mkdir()
    (workspace / "code/outputs/deep/report").write_text("kept")
    assert commit(job, workspace, say=print, with_outputs=False) == {}
    assert store.read_bytes("run/_run/outputs/deep/report") == b"kept"
    assert not store.exists("run/model")
    assert not store.exists("run/_run/logs")


@pytest.mark.parametrize("link", ["/etc/hostname", "../control/secret"])
def test_an_output_that_leads_elsewhere_is_not_sent(store, workspace, link):
    (workspace / "control" / "secret").write_text("canary")
    (workspace / "outputs" / "model").symlink_to(link)
    job = make_job(store, outputs={"model": WantedOutput("lake", "run/model", "model")})
    with pytest.raises(DataError, match=r"step 'train', output 'model': is a symbolic link"):
        commit(job, workspace, say=print)
    assert not store.exists("run")


def test_kept_files_that_lead_elsewhere_are_left_out(store, workspace):
    (workspace / "control" / "secret").write_text("canary")
    (workspace / "code" / "outputs").rmdir()
    (workspace / "code" / "outputs").symlink_to("../control")
    (workspace / "code" / "logs" / "x").symlink_to("../../control/secret")
    commit(make_job(store, kept=("lake", "run/_run")), workspace, say=print)
    assert not store.exists("run")


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def worker(monkeypatch) -> Iterator[TextIO]:
    """What the worker writes to the agent's stdin."""
    read, write = os.pipe()
    with open(read) as stdin, open(write, "w", buffering=1) as worker:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield worker


@pytest.fixture
def document(tmp_path, workspace, monkeypatch) -> Path:
    """Where the agent finds its job, as it does in a pod."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", "x")
    monkeypatch.setenv("AIRFLOW_HOME", "x")
    return tmp_path / "job.json"


def test_the_agent_sends_with_the_credentials_that_the_worker_has_now(
    worker, document, workspace, monkeypatch
):
    opened = []

    def commit(job, *_, **__):
        opened.append(job.datastores)
        return {}

    monkeypatch.setattr(command_line, "commit", commit)
    old = {"name": "lake", "url": "s3://lake/team", "arguments": {"key": "expired"}}
    cold = {**old, "name": "cold", "url": "s3://cold"}
    job = Job(release="0", step="t", step_run="r", datastores={"lake": old, "cold": cold})
    document.write_text(job.to_json())
    new = {**old, "arguments": {"key": "new"}}
    moved = {**cold, "url": "s3://elsewhere"}

    worker.write(json.dumps({"lake": new, "cold": moved, "other": new}) + "\n")
    assert command_line.main(["commit", str(document)]) == 0
    assert opened == [{"lake": new, "cold": cold}]


@pytest.mark.parametrize("line", ["", "nothing\n", "[]\n", "7\n"])
def test_without_word_from_the_worker_the_agent_goes_by_its_document(
    worker, document, store, capsys, monkeypatch, line
):
    monkeypatch.setattr(command_line, "_NEWER_SECONDS", 0.1)
    document.write_text(make_job(store).to_json())
    worker.write(line)
    assert command_line.main(["commit", str(document)]) == 0
    assert json.loads(capsys.readouterr().out) == {"result": {}}


def test_the_worker_learns_whether_a_datastore_is_to_blame(
    worker, document, store, workspace, capsys, monkeypatch
):
    (workspace / "outputs" / "model").write_text("made")
    job = make_job(store, outputs={"model": WantedOutput("lake", "run/model", "model")})
    document.write_text(job.to_json())

    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(store.filesystem, "put_file", refuse)
    worker.write("{}\n")
    assert command_line.main(["commit", str(document)]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["store"] is True
    assert "'model': datastore 'lake': " in answer["error"]


def test_errors_reach_the_worker_as_messages(
    worker, document, store, tmp_path, monkeypatch, capsys
):
    outputs = {"model": WantedOutput("lake", "run/model", "model")}
    document.write_text(make_job(store, outputs=outputs).to_json())
    monkeypatch.setattr(command_line, "_TERMINATION_LOG", tmp_path / "termination")
    worker.write("{}\n")
    assert command_line.main(["commit", str(document)]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"].startswith("step 'train', output 'model': was not made")
    assert answer["store"] is False

    document.write_text(document.read_text().replace('"version": 1', '"version": 7'))
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    assert command_line.main(["stage", str(document)]) == 3
    assert "version 7" in json.loads((tmp_path / "termination").read_text())["error"]


def test_an_error_fits_into_a_termination_message(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "_TERMINATION_LOG", tmp_path / "termination")
    command_line._note_failure("ü" * 5000)
    written = (tmp_path / "termination").read_text()
    assert len(written) < 4096
    assert json.loads(written)["error"].startswith("üüü")


def test_work_goes_on_when_the_worker_has_gone(monkeypatch):
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    command_line._answer({"say": "anybody there?"})


def test_wrong_use_is_told(capsys):
    for wrong in (["commit"], [], ["commit", "job", "files"], ["look", "job"], ["stage"]):
        assert command_line.main(wrong) == 2
        assert "stage JOB [FILES] | commit JOB | keep JOB" in capsys.readouterr().err


def test_the_agent_needs_no_more_than_its_image_has():
    program = (
        "import sys, airflow_mlpipelines.agent.__main__\n"
        "print([n for n in ('airflow', 'pydantic', 'sqlalchemy', 'yaml', 'filelock', 'kubernetes') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
