"""Pipelines found in files; a file that has none ends the command with one clear message."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.cli.files import load_pipeline, load_pipelines

TWO = """
from airflow_mlpipelines import CommandStep, Pipeline, Workspace

ws = Workspace.from_config()
for name in ("training", "scoring"):
    Pipeline(ws, [CommandStep(["true"], name)], name=name)
"""
NIGHTLY = """
from airflow_mlpipelines import CommandStep, Pipeline, Workspace

dag = Pipeline(Workspace.from_config(), [CommandStep(["true"])], name="churn").to_dag("nightly")
"""


@pytest.fixture(params=["check", "graph", "plan", "run", "submit"])
def command(request):
    """Each command that takes a file."""
    return request.param


def assert_refused(answer, *parts):
    """Check that the command ended with code 2 and one line that says all of this."""
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    for part in parts:
        assert part in answer.err


def test_a_file_that_is_not_there_is_named(mlpipelines, tmp_path, command):
    assert_refused(mlpipelines(command, tmp_path / "absent.py"), "absent.py is not there")


def test_a_file_that_raises_is_named_with_its_error(mlpipelines, write, command):
    file = write("1 / 0\n")

    assert_refused(
        mlpipelines(command, file), "words.py raises ZeroDivisionError: division by zero"
    )


def test_a_file_that_is_no_python_is_named(mlpipelines, write, command):
    assert_refused(mlpipelines(command, write("def :\n")), "words.py raises SyntaxError")


def test_a_file_that_ends_the_process_is_no_success(mlpipelines, write, command):
    file = write("import sys\nsys.exit(0)\n")

    assert_refused(mlpipelines(command, file), "words.py raises SystemExit")


def test_a_file_without_a_pipeline_says_so(mlpipelines, write, command):
    assert_refused(mlpipelines(command, write("x = 1\n")), "words.py makes no Pipeline")


def test_a_directory_is_no_file(mlpipelines, tmp_path, command):
    assert_refused(mlpipelines(command, tmp_path), "is not there")


def test_a_file_of_another_kind_is_no_python_file(mlpipelines, write, command):
    assert_refused(mlpipelines(command, write("", "words.txt")), "words.txt is no Python file")


def test_a_wrong_name_in_the_file_is_told_as_the_pipeline_tells_it(mlpipelines, write, command):
    file = write(
        "from airflow_mlpipelines import Workspace\nWorkspace.from_config().datastores['stor']\n"
    )

    assert_refused(
        mlpipelines(command, file), "datastore 'stor' is not in", "Did you mean 'store'?"
    )


@pytest.mark.parametrize("command", ["graph", "plan", "run", "submit"])
def test_of_several_pipelines_one_has_to_be_chosen(mlpipelines, write, command):
    answer = mlpipelines(command, write(TWO))

    assert_refused(answer, "makes 2 pipelines: choose one with --pipeline", "training", "scoring")


def test_a_pipeline_is_chosen_by_name(mlpipelines, write):
    answer = mlpipelines("graph", write(TWO), "--pipeline", "scoring")

    assert answer.code == 0
    assert answer.out.startswith("scoring ")


def test_a_pipeline_that_the_file_does_not_make_is_guessed(mlpipelines, write):
    answer = mlpipelines("graph", write(TWO), "--pipeline", "scorin")

    assert_refused(answer, "makes no pipeline 'scorin'", "Did you mean 'scoring'?")


def test_a_pipeline_is_chosen_by_the_id_of_its_dag(write):
    file = write(NIGHTLY)

    assert load_pipeline(file, "nightly").name == "churn"
    assert load_pipeline(file, "churn").dag_id == "nightly"


def test_the_debug_variable_shows_the_traceback(mlpipelines, write, monkeypatch):
    monkeypatch.setenv("MLPIPELINES_DEBUG", "1")

    with pytest.raises(ZeroDivisionError):
        mlpipelines("check", write("1 / 0\n"))


def test_a_file_may_import_what_lies_beside_it_and_make_dataclasses(write):
    write("STEP = 'from_beside'\n", "beside_words.py")
    file = write(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from airflow_mlpipelines import CommandStep, Pipeline, Workspace\n"
        "from beside_words import STEP\n"
        "@dataclass\n"
        "class Options:\n"
        "    name: str\n"
        "Pipeline(Workspace.from_config(), [CommandStep(['true'], Options(STEP).name)])\n"
    )

    (pipeline,) = load_pipelines(file)

    assert pipeline.name == "words"
    assert [step.name for step in pipeline.steps] == ["from_beside"]
