"""What the commands show, and how they end."""

from __future__ import annotations

import re
import socket

import pytest

from airflow_mlpipelines.definition.graph import PipelineGraph

BROKEN = """
from airflow_mlpipelines import CommandStep, Pipeline, PipelineData, Workspace

table = PipelineData("table")
step = CommandStep(["cat", table], "read", inputs=[table], compute_target="gpu")
pipeline = Pipeline(Workspace.from_config(), [step], name="broken")
"""


@pytest.fixture
def closed_port(monkeypatch):
    """An Airflow server's address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("AIRFLOW_API_URL", url)
    monkeypatch.setenv("AIRFLOW_API_TOKEN", "token")
    return url


# ---- how they end ------------------------------------------------------------------------------


def test_a_fine_pipeline_checks_with_code_0(mlpipelines, words):
    answer = mlpipelines("check", words)

    assert (answer.code, answer.out, answer.err) == (0, "words: fine\n", "")


@pytest.mark.parametrize("last_line", ["", "dag = pipeline.to_dag()\n"])
def test_problems_end_a_check_with_code_1_and_each_is_told(mlpipelines, write, words, last_line):
    answer = mlpipelines("check", write(BROKEN + last_line, "broken.py"), words)

    assert answer.code == 1
    assert answer.err == ""
    first, *problems, last = answer.out.splitlines()
    assert first == f"broken: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    assert any("compute 'gpu' is not in" in line for line in problems)
    assert all(line.startswith("  - step 'read'") for line in problems)
    assert last == "words: fine"


def test_a_check_as_json_has_every_file_and_problem(mlpipelines, write, words):
    broken = write(BROKEN, "broken.py")

    answer = mlpipelines("check", "--json", words, broken)

    assert answer.code == 1
    fine, bad = answer.json
    assert fine == {"file": str(words), "pipeline": "words", "problems": []}
    assert (bad["file"], bad["pipeline"]) == (str(broken), "broken")
    assert any("'gpu'" in problem for problem in bad["problems"])


@pytest.mark.parametrize("command", ["graph", "plan", "run", "submit"])
def test_other_commands_refuse_a_broken_pipeline_with_code_2(mlpipelines, write, command):
    answer = mlpipelines(command, write(BROKEN))

    assert answer.code == 2
    assert answer.out == ""
    assert re.match(r"error: Pipeline 'broken' has \d problems?:\n  - step 'read'", answer.err)
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("arguments", [["plant"], ["run"], ["run", "words.py", "--regenrate"]])
def test_a_command_that_is_written_wrongly_ends_with_code_2(mlpipelines, arguments):
    answer = mlpipelines(*arguments)

    assert answer.code == 2
    assert "Usage: " in answer.err


def test_a_server_that_does_not_answer_ends_submit_with_code_3(mlpipelines, words, closed_port):
    answer = mlpipelines("submit", words)

    assert answer.code == 3
    assert answer.out == ""
    assert answer.err.startswith(f"error: {closed_port} can't be reached: ")
    assert answer.err.count("\n") == 1


def test_submit_without_a_server_says_which_variables_name_one(mlpipelines, words, monkeypatch):
    monkeypatch.delenv("AIRFLOW_API_URL", raising=False)

    answer = mlpipelines("submit", words)

    assert answer.code == 3
    assert answer.err.startswith("error: no Airflow server is named: set AIRFLOW_API_URL, and ")


@pytest.mark.parametrize(
    "arguments", [["cache", "ls"], ["cache", "show", "ab"], ["explain", "words", "tidy"]]
)
def test_a_metadata_database_that_cannot_be_opened_ends_with_code_3(
    mlpipelines, tmp_path, monkeypatch, arguments
):
    monkeypatch.setenv("MLPIPELINES_METADATA_URL", f"sqlite:///{tmp_path}")

    answer = mlpipelines(*arguments)

    assert answer.code == 3
    assert answer.err.startswith("error: the metadata database ")
    assert "Traceback" not in answer.err


# ---- graph -------------------------------------------------------------------------------------


def test_the_graph_as_text_says_what_each_step_reads_and_makes(mlpipelines, words):
    answer = mlpipelines("graph", words)

    assert answer.code == 0
    assert answer.out.splitlines() == [
        "words  (2 steps, workspace test)",
        "  parameter rate: float = 0.5",
        "  parameter top: int = 3",
        "  parameter mode: string = 'fast'",
        "  parameter dry: bool = False",
        "  tidy  [CommandStep on local]",
        "    <- raw: words/raw.txt on store",
        "    -> upper",
        "  count  [CommandStep on local]",
        "    <- upper: upper of tidy",
        "    -> total",
    ]


def test_the_graph_as_mermaid_is_a_flowchart(mlpipelines, words):
    answer = mlpipelines("graph", words, "--format", "mermaid")

    assert answer.code == 0
    assert answer.out.splitlines() == [
        "flowchart LR",
        '  s0["tidy"]',
        '  s1["count"]',
        '  d0[("words/raw.txt")] --> s0',
        "  s0 -- upper --> s1",
    ]


def test_steps_that_only_wait_are_drawn_too(mlpipelines, write):
    file = write(
        "from airflow_mlpipelines import *\n"
        "one, two = CommandStep(['true'], 'say \"one\"'), CommandStep(['true'], 'two')\n"
        "two.run_after(one)\n"
        "Pipeline(Workspace.from_config(), [two])\n"
    )

    mermaid = mlpipelines("graph", file, "--format", "mermaid").out.splitlines()
    text = mlpipelines("graph", file).out.splitlines()

    assert mermaid == ["flowchart LR", "  s0[\"say 'one'\"]", '  s1["two"]', "  s0 -.-> s1"]
    assert [line for line in text if "after" in line] == ["    <- after say_one"]


def test_the_graph_as_json_is_the_pipelines_own_form(mlpipelines, words):
    answer = mlpipelines("graph", words, "--format", "json")

    graph = PipelineGraph.model_validate_json(answer.out)
    assert [step.id for step in graph.steps] == ["tidy", "count"]
    assert graph.offers == {"total": ("count", "total")}


def test_an_unknown_form_of_the_graph_names_those_that_there_are(mlpipelines, words):
    answer = mlpipelines("graph", words, "--format", "dot")

    assert answer.code == 2
    assert "'dot' is none of text, mermaid, json" in " ".join(answer.err.replace("│", "").split())


# ---- plan --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("index")
def test_a_plan_as_json_says_what_happens_to_each_step(mlpipelines, words):
    answer = mlpipelines("plan", words, "--json", "-p", "rate=1")

    assert answer.code == 0
    assert len(answer.out.splitlines()) == 1
    assert answer.json == {
        "dag_id": "words",
        "steps": [
            {
                "name": "tidy",
                "task_id": "tidy",
                "decision": "run",
                "reason": "never ran before in this pipeline",
                "seconds": 0.0,
                "outputs": {},
            },
            {
                "name": "count",
                "task_id": "count",
                "decision": "later",
                "reason": "decided once tidy has run",
                "seconds": 0.0,
                "outputs": {},
            },
        ],
    }


def test_a_plan_for_people_has_a_line_for_each_step_and_stores_nothing(
    mlpipelines, words, index, tmp_path
):
    answer = mlpipelines("plan", words)

    assert answer.code == 0
    rows = [line.split() for line in answer.out.splitlines()]
    assert rows[1][:3] == ["tidy", "run", "never"]
    assert rows[2][:3] == ["count", "later", "decided"]
    assert index.list_entries() == []
    assert index.find_step_runs() == []
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert files == [tmp_path / "data" / "words" / "raw.txt"]
