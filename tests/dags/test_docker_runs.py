"""Whole pipelines whose steps are containers of a real Docker daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_mlpipelines import (
    CommandStep,
    DataReference,
    DockerCompute,
    Pipeline,
    PipelineData,
    PythonScriptStep,
    Workspace,
)
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.operators.connections import metadata_url
from tests.dags.project import Project, run_dag
from tests.integration.docker.conftest import IMAGE, docker_cli
from tests.parts import missing, require_docker

pytestmark = [pytest.mark.airflow, pytest.mark.docker, pytest.mark.usefixtures("airflow_db")]
MEASURE = """
import pathlib, sys
from airflow_mlpipelines import Run

run = Run.get_context()
run.log("answer", 42)
run.log_list("loss", [3, 2, 1])
pathlib.Path("outputs").mkdir(exist_ok=True)
pathlib.Path("outputs", "note.txt").write_text("kept")
pathlib.Path(sys.argv[1]).write_text("measured")
"""


@pytest.fixture
def compute() -> DockerCompute:
    require_docker()
    if not docker_cli("images", "-q", IMAGE):
        missing(f"the Docker daemon has no image {IMAGE} (.ci/python-image.sh makes one)")
    return DockerCompute("docker", image=IMAGE)


def read(outputs: dict[str, dict[str, str]], step: str, output: str) -> Path:
    return Path(outputs[step][output]["uri"].removeprefix("file://"))


def test_steps_hand_on_data_between_containers_and_only_the_changed_one_runs_again(
    tmp_path: Path, compute: DockerCompute
):
    options = {step: {"compute_target": compute} for step in ("clean", "train", "report")}
    project = Project(tmp_path, options=options)
    first = project.run()
    assert first.state == "success"
    assert first.ran == {"clean", "train", "report"}
    assert read(first.outputs, "report", "report").read_text() == "the model says 1.5 v1"

    assert project.run().ran == set()
    project.edit("train.py", "table.count(word)", "2 * table.count(word)")
    again = project.run()

    assert again.ran == {"train", "report"}
    assert read(again.outputs, "report", "report").read_text() == "the model says 3.0 v1"


def test_a_step_needs_no_outputs(compute: DockerCompute):
    step = CommandStep(["sh", "-c", "echo hello"], name="say", compute_target=compute)
    outcome = run_dag(Pipeline(Workspace.from_config(), [step], name="docker_say").to_dag())

    assert outcome.steps == {"say": "ran"}


def test_metrics_and_kept_files_come_out_of_the_container(tmp_path: Path, compute: DockerCompute):
    (tmp_path / "measure.py").write_text(MEASURE)
    out = PipelineData("out")
    step = PythonScriptStep(
        "measure.py",
        arguments=[out],
        outputs=[out],
        compute_target=compute,
        source_directory=str(tmp_path),
    )
    dag = Pipeline(Workspace.from_config(), [step], name="docker_measure").to_dag()

    outcome = run_dag(dag)

    assert outcome.steps == {"measure": "ran"}
    output = read(outcome.outputs, "measure", "out")
    assert output.read_text() == "measured"
    assert output.stat().st_uid == tmp_path.stat().st_uid
    (kept,) = output.parent.rglob("note.txt")
    assert kept.read_text() == "kept"
    (record,) = MetadataIndex(metadata_url()).find_step_runs(dag_id="docker_measure")
    assert record.metrics == {"answer": 42, "loss": [3, 2, 1]}


def test_files_that_a_container_writes_are_uploaded(tmp_path: Path, compute: DockerCompute):
    (tmp_path / "mlpipelines.yaml").write_text("name: u\ndatastores:\n  lake: {url: lake}\n")
    ws = Workspace.from_config(tmp_path)
    place = DataReference(ws.datastores["lake"], "place", "place").as_upload("results")
    step = CommandStep(
        ["sh", "-c", 'echo one > "$1/a"; echo two > results/b', "sh", place],
        name="write",
        compute_target=compute,
    )

    outcome = run_dag(Pipeline(ws, [step], name="docker_upload").to_dag())

    assert outcome.steps == {"write": "ran"}
    found = {file.name: file.read_text() for file in (tmp_path / "lake/place").iterdir()}
    assert found == {"a": "one\n", "b": "two\n"}
