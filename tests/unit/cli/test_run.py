"""``mlpipelines run`` and ``submit``: real runs in processes of their own, and one on a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.cli.conftest import WORDS, WORKSPACE, Answer
from tests.unit.submission.airflow_server import AirflowServer

FAILING = """
from airflow_mlpipelines import CommandStep, Pipeline, PipelineData, Workspace

table = PipelineData("table")
load = CommandStep(["sh", "-c", "echo the disk is full; exit 3", table], "load", outputs=[table])
use = CommandStep(["cat", table], "use", inputs=[table])
pipeline = Pipeline(Workspace.from_config(), [use], name="failing")
"""
PROGRAM = "from airflow_mlpipelines.cli import main; main()"


@dataclass(frozen=True)
class Desk:
    """A folder with pipelines and an Airflow home of its own."""

    root: Path

    def call(self, *arguments: str) -> Answer:
        """Call ``mlpipelines`` in a process of its own, as somebody at a desk does."""
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AIRFLOW", "MLPIPELINES"))
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=self.root,
            env={**own, "AIRFLOW_HOME": str(self.root / "airflow")},
            capture_output=True,
            text=True,
            timeout=200,
        )
        return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A desk with the pipelines of words and one that fails."""
    root = tmp_path_factory.mktemp("desk")
    (root / "mlpipelines.yaml").write_text(WORKSPACE)
    (root / "words.py").write_text(WORDS)
    (root / "failing.py").write_text(FAILING)
    (root / "data" / "words").mkdir(parents=True)
    (root / "data" / "words" / "raw.txt").write_text("air port\nair plane\n")
    return Desk(root)


@pytest.fixture(scope="module")
def first(desk):
    """The first run of words."""
    return desk.call("run", "words.py", "--json", "-p", "top=7")


@pytest.fixture(scope="module")
def second(desk, first):
    """The same run again."""
    assert first.code == 0
    return desk.call("run", "words.py", "--json", "-p", "top=7")


@pytest.fixture(scope="module")
def failed(desk):
    """The run whose first step fails."""
    return desk.call("run", "failing.py", "--json")


@pytest.mark.airflow
def test_a_run_ends_with_json_of_what_its_steps_did(first):
    assert first.code == 0, first.err
    summary = first.json
    assert list(summary) == ["dag_id", "run_id", "state", "steps"]
    assert (summary["dag_id"], summary["state"]) == ("words", "success")
    assert summary["run_id"]
    tidy, count = summary["steps"]
    for step, name, output in ((tidy, "tidy", "upper"), (count, "count", "total")):
        assert list(step) == ["name", "task_id", "state", "reason", "seconds", "outputs"]
        assert (step["name"], step["task_id"], step["state"]) == (name, name, "ran")
        assert step["reason"] == "never ran before in this pipeline"
        assert 0 < step["seconds"] < 30
        assert list(step["outputs"]) == [output]
    made = Path(count["outputs"]["total"]["uri"].removeprefix("file://"))
    assert made.read_text().split() == ["4"]


@pytest.mark.airflow
def test_a_dag_file_runs_as_it_stands(desk):
    file = Path(__file__).parents[3] / "dags" / "first_pipeline.py"  # it ends with to_dag()

    done = desk.call("run", str(file), "--json")

    assert done.code == 0, done.err
    steps = json.loads(done.out.splitlines()[-1])["steps"]
    assert {step["name"]: step["state"] for step in steps} == {
        "count.py": "ran",
        "publish.py": "ran",
    }


@pytest.mark.airflow
def test_the_same_run_again_reuses_every_step(first, second):
    assert second.code == 0, second.err
    before = {step["name"]: step["outputs"] for step in first.json["steps"]}
    assert second.json["run_id"] != first.json["run_id"]
    assert {step["name"]: step["state"] for step in second.json["steps"]} == {
        "tidy": "reused",
        "count": "reused",
    }
    assert {step["name"]: step["outputs"] for step in second.json["steps"]} == before
    for step in second.json["steps"]:
        assert step["reason"].startswith("nothing changed since ")
        assert step["seconds"] == 0.0


@pytest.mark.airflow
def test_a_run_that_fails_ends_with_code_1_and_the_reason(failed):
    assert failed.code == 1
    assert failed.json["state"] == "failed"
    load, use = failed.json["steps"]
    assert (load["name"], load["state"]) == ("load", "failed")
    assert "exit code 3" in load["reason"]
    assert (use["state"], use["reason"]) == ("not_started", "a step before it failed")
    assert "the disk is full" in failed.out + failed.err


@pytest.mark.airflow
def test_the_other_commands_tell_of_the_runs(desk, first, second, mlpipelines, monkeypatch):
    url = f"sqlite:///{desk.root}/airflow/mlpipelines/metadata.db"
    monkeypatch.setenv("MLPIPELINES_METADATA_URL", url)
    outputs = {step["name"]: step["outputs"] for step in first.json["steps"]}

    plan = mlpipelines("plan", desk.root / "words.py", "--json", "-p", "top=7").json
    changed = mlpipelines("plan", desk.root / "words.py", "--json", "-p", "top=8").json
    entries = mlpipelines("cache", "ls", "--json", "--pipeline", "words").json
    explained = mlpipelines("explain", "words", "count", "--json").json

    assert [(step["decision"], step["outputs"]) for step in plan["steps"]] == [
        ("reuse", outputs["tidy"]),
        ("reuse", outputs["count"]),
    ]
    assert all(step["seconds"] > 0 for step in plan["steps"])
    assert [(step["decision"], step["reason"]) for step in changed["steps"]] == [
        ("reuse", plan["steps"][0]["reason"]),
        ("run", "top 7 -> 8"),
    ]
    assert [entry["step"] for entry in entries] == ["count", "tidy"]
    assert (explained["run_id"], explained["state"]) == (second.json["run_id"], "reused")
    assert explained["reason"] == second.json["steps"][1]["reason"]


# ---- on a server -------------------------------------------------------------------------------


@pytest.fixture
def airflow(monkeypatch):
    """A server that has the DAG ``words``; a run of it is over at the second look."""
    run = "/api/v2/dags/words/dagRuns/run1"
    tasks = [{"task_id": name, "state": "success", "duration": 1.0} for name in ("tidy", "count")]
    tidy = {"state": "ran", "reason": "never ran before in this pipeline", "seconds": 1.5}
    count = {"state": "ran", "reason": "top 3 -> 7", "seconds": 0.5}
    with AirflowServer() as server:
        monkeypatch.setenv("AIRFLOW_API_URL", server.url)
        monkeypatch.setenv("AIRFLOW_API_TOKEN", "good")
        server.answers = {
            "POST /api/v2/dags/words/dagRuns": [(200, {"dag_run_id": "run1"})],
            f"GET {run}": [(200, {"state": "running"}), (200, {"state": "success"})],
            f"GET {run}/taskInstances": [(200, {"task_instances": tasks, "total_entries": 2})],
            f"GET {run}/taskInstances/tidy/xcomEntries/step_run": [(200, {"value": tidy})],
            f"GET {run}/taskInstances/count/xcomEntries/step_run": [(200, {"value": count})],
        }
        yield server


def test_submit_follows_a_run_and_ends_with_the_same_json_as_run(mlpipelines, words, airflow):
    answer = mlpipelines("submit", words, "--json", "-p", "top=7", "--regenerate", "tidy")

    assert answer.code == 0
    (started,) = airflow.asked("POST /api/v2/dags/words/dagRuns")
    assert started.body["conf"] == {"top": 7, "regenerate_outputs": ["tidy"]}
    assert (answer.json["run_id"], answer.json["state"]) == ("run1", "success")
    assert [(step["name"], step["state"]) for step in answer.json["steps"]] == [
        ("tidy", "ran"),
        ("count", "ran"),
    ]
    assert [line.split() for line in answer.err.splitlines()] == [
        ["ran", "tidy", "1.5", "s", "never", "ran", "before", "in", "this", "pipeline"],
        ["ran", "count", "0.5", "s", "top", "3", "->", "7"],
    ]


def test_submit_for_people_ends_with_a_table_and_the_state(mlpipelines, words, airflow):
    answer = mlpipelines("submit", words)

    assert answer.code == 0
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert lines == [
        "step state took why",
        "tidy ran 1.5 s never ran before in this pipeline",
        "count ran 0.5 s top 3 -> 7",
        "words: success. Reuse saved nothing.",
    ]


def test_a_submitted_run_that_fails_ends_with_code_1(mlpipelines, words, airflow):
    airflow.answers["GET /api/v2/dags/words/dagRuns/run1"] = [(200, {"state": "failed"})]

    answer = mlpipelines("submit", words, "--json")

    assert (answer.code, answer.json["state"]) == (1, "failed")


def test_submit_without_following_tells_the_run_and_leaves(mlpipelines, words, airflow):
    answer = mlpipelines("submit", words, "--no-follow", "--json")
    told = mlpipelines("submit", words, "--no-follow")

    assert (answer.code, told.code) == (0, 0)
    assert json.loads(answer.out) == {"dag_id": "words", "run_id": "run1"}
    assert told.out == "words: started run1\n"
    assert {item.method for item in airflow.requests} == {"POST"}


@pytest.mark.usefixtures("airflow")
def test_a_dag_that_the_server_lacks_ends_submit_with_code_3(mlpipelines, write):
    answer = mlpipelines("submit", write(FAILING))

    assert answer.code == 3
    assert (
        "has no DAG 'failing'. Put the pipeline's file into the server's DAG folder" in answer.err
    )
