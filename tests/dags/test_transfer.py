"""Transfers as steps of runs: reuse, changes at either end, kinds of places."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from airflow_mlpipelines import (
    CommandStep,
    DataReference,
    DataTransferStep,
    Pipeline,
    PipelineData,
    Workspace,
)
from tests.dags.project import run_dag

pytestmark = [pytest.mark.airflow, pytest.mark.usefixtures("airflow_db")]


@pytest.fixture
def project(tmp_path):
    """Runs a pipeline of one transfer from ``from/raw`` to ``to/copy``, and a step that reads it."""

    class Project:
        source, target = tmp_path / "from" / "raw", tmp_path / "to" / "copy"

        def run(self, destination=None, path="raw", **options):
            (tmp_path / "mlpipelines.yaml").write_text(
                "name: t\ndatastores:\n  from: {url: from}\n  to: {url: to}\n"
                "computes:\n  docker: {type: docker, image: 'x:1'}\n  local: {type: local}\n"
            )
            ws = Workspace.from_config(tmp_path)
            raw = DataReference(ws.datastores["from"], "raw", path)
            copy = DataReference(ws.datastores["to"], "copy", "copy", overwrite=True)
            move = DataTransferStep("move", raw, destination or copy, **options)
            listing = PipelineData("listing")
            look = CommandStep(
                ["sh", "-c", f"cd {move.get_output()} && ls > {listing}"],
                name="look",
                inputs=[move.get_output()],
                outputs=[listing],
                compute_target="local",
            )
            name = f"transfer_{tmp_path.name}"
            return run_dag(Pipeline(ws, [look] if path == "raw" else [move], name=name).to_dag())

    made = Project()
    made.source.mkdir(parents=True)
    (made.source / "a.txt").write_text("one")
    (made.source / "b.txt").write_text("two")
    return made


def test_a_transfer_is_reused_until_one_of_its_ends_changes(project):
    first = project.run()
    assert (first.state, first.ran) == ("success", {"move", "look"})
    assert (project.target / "a.txt").read_text() == "one"
    assert first.outputs["move"]["copy"]["uri"] == project.target.as_uri()

    assert project.run().steps == {"move": "reused", "look": "reused"}

    (project.target / "a.txt").write_text("ONE")  # as many bytes
    third = project.run()
    assert third.steps == {"move": "ran", "look": "reused"}
    assert "was written to since" in third.reasons["move"]
    assert (project.target / "a.txt").read_text() == "one"

    (project.source / "b.txt").unlink()
    fourth = project.run()
    assert fourth.ran == {"move", "look"}
    assert [file.name for file in project.target.iterdir()] == ["a.txt"]


def test_a_new_place_of_the_run_is_a_destination_too(project):
    first = project.run(destination=PipelineData("copied"))

    assert first.state == "success"
    assert first.outputs["move"]["copied"]["files"] == 2
    assert project.run(destination=PipelineData("copied")).ran == set()


def test_a_file_goes_into_a_directory_under_its_name(project):
    project.target.mkdir(parents=True)
    (project.target / "other.txt").write_text("stays")

    done = project.run(path="raw/a.txt")

    assert done.state == "success"
    assert done.outputs["move"]["copy"]["kind"] == "file"
    assert sorted(file.name for file in project.target.iterdir()) == ["a.txt", "other.txt"]


def test_a_source_of_the_other_kind_and_a_missing_one_fail_with_the_reason(project):
    done = project.run(source_reference_type="file")
    assert done.steps["move"] == "failed"
    assert "is a directory, but source_reference_type is 'file'" in done.reasons["move"]

    gone = project.run(path="nowhere")
    assert (
        "nothing at 'nowhere' of datastore 'from' to transfer to datastore 'to'"
        in (gone.reasons["move"])
    )


def test_the_pipeline_of_the_guide_brings_what_the_partner_has(tmp_path, monkeypatch):
    (tmp_path / "mlpipelines.yaml").write_text(
        "name: t\ndefault_datastore: lake\ndatastores:\n  partner: {url: partner}\n  lake: {url: lake}\n"
    )
    dag_file = tmp_path / "transfer_dag.py"
    dag_file.write_text((Path(__file__).parent / "transfer_dag.py").read_text())
    monkeypatch.setenv("MLPIPELINES_CONFIG", str(tmp_path / "mlpipelines.yaml"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code/count.py").write_text("import os, sys; print(len(os.listdir(sys.argv[1])))\n")
    exports = tmp_path / "partner" / "exports" / "flights"
    exports.mkdir(parents=True)
    (exports / "monday.csv").write_text("1")

    done = run_dag(runpy.run_path(str(dag_file))["dag"])

    assert done.steps == {"fetch": "ran", "count": "ran"}
    assert (tmp_path / "lake/raw/flights/monday.csv").read_text() == "1"
