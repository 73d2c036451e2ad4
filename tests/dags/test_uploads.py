"""References in mode ``upload``: places that a step's files go to when it has succeeded."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from airflow_mlpipelines import CommandStep, DataReference, Pipeline, PipelineData, Workspace
from airflow_mlpipelines.exceptions import PipelineCheckError
from tests.dags.project import run_dag

pytestmark = [pytest.mark.airflow, pytest.mark.usefixtures("airflow_db")]


@pytest.fixture
def project(tmp_path):
    """Runs a pipeline of one step with a shell script, whose files are uploaded to ``lake/place``.

    What it writes to its second argument is uploaded to ``lake/second``.
    """

    class Project:
        place = tmp_path / "lake" / "place"

        def workspace(self):
            (tmp_path / "mlpipelines.yaml").write_text(
                "name: u\ndefault_datastore: home\n"
                "datastores:\n  home: {url: home}\n  lake: {url: lake}\n"
            )
            return Workspace.from_config(tmp_path)

        second = tmp_path / "lake" / "second"

        def run(self, script, *, outputs=(), retries=0, second=False, **options):
            ws = self.workspace()
            wanted = {"path_on_datastore": "place", "mode": "upload", **options}
            place = DataReference(ws.datastores["lake"], "place", **wanted)
            places = [place]
            if second:
                places.append(DataReference(ws.datastores["lake"], "second", "second").as_upload())
            step = CommandStep(
                ["sh", "-c", script, "sh", *places],
                name="write",
                inputs=places,
                outputs=list(outputs),
                retries=retries,
                retry_delay=1,
            )
            name = f"uploads_{tmp_path.name}"
            return run_dag(Pipeline(ws, [step], name=name).to_dag())

        def files(self):
            found = self.place.rglob("*")
            return {
                file.relative_to(self.place).as_posix(): file.read_text()
                for file in found
                if file.is_file()
            }

    return Project()


def test_files_are_uploaded_and_the_step_is_reused_until_somebody_writes_to_the_place(
    project, tmp_path
):
    script = 'mkdir "$1/sub" && echo one > "$1/a.txt" && echo two > "$AZUREML_DATAREFERENCE_place/sub/b.txt"'
    first = project.run(script)
    assert first.steps == {"write": "ran"}
    assert project.files() == {"a.txt": "one\n", "sub/b.txt": "two\n"}
    assert list((tmp_path / "home/uploads").iterdir()) == []  # the notes of what was under way
    made = first.outputs["write"]["place"]
    assert (made["uri"], made["files"]) == (project.place.as_uri(), 2)

    assert project.run(script).steps == {"write": "reused"}

    (project.place / "a.txt").write_text("ONE\n")
    third = project.run(script, overwrite=True)
    assert third.steps == {"write": "ran"}
    assert "was written to since" in third.reasons["write"]
    assert project.files()["a.txt"] == "one\n"

    (project.place / "a.txt").unlink()
    assert project.run(script).steps == {"write": "ran"}


def test_another_place_is_another_step(project):
    assert project.run('echo 1 > "$1/a"').steps == {"write": "ran"}

    assert project.run('echo 1 > "$1/a"', path_on_datastore="place/b").steps == {"write": "ran"}
    assert project.files() == {"a": "1\n", "b/a": "1\n"}


def test_files_of_others_stay_and_are_replaced_only_where_the_reference_says_so(project):
    project.place.mkdir(parents=True)
    (project.place / "a.txt").write_text("theirs")
    (project.place / "theirs.txt").write_text("theirs")
    script = 'echo ours > "$1/a.txt"; echo ours > "$1/b.txt"'

    refused = project.run(script)
    assert refused.state == "failed"
    assert "step 'write', upload 'place'" in refused.reasons["write"]
    assert (
        "holds ['a.txt'] already, with other content. Nothing was sent" in refused.reasons["write"]
    )
    assert project.files() == {"a.txt": "theirs", "theirs.txt": "theirs"}

    assert project.run(script, overwrite=True).state == "success"
    assert project.files() == {"a.txt": "ours\n", "b.txt": "ours\n", "theirs.txt": "theirs"}
    # The same bytes are no conflict: a second try must not fail for what the first has sent.
    assert project.run(script + " # again").state == "success"


def test_nothing_is_uploaded_when_the_step_fails_or_an_output_is_missing(project):
    assert project.run('echo 1 > "$1/a"; exit 3').state == "failed"
    lost = project.run('echo 1 > "$1/a"', outputs=[PipelineData("table")])

    assert "output 'table': was not made" in lost.reasons["write"]
    assert not project.place.exists()


def test_a_directory_that_became_a_link_out_is_not_uploaded(project, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("of somebody else")

    run = project.run(f'rmdir "$1" && ln -s {tmp_path}/private "$1"')

    assert run.state == "failed"
    assert project.files() == {}


def test_a_step_that_writes_nothing_there_is_told_so(project):
    failed = project.run("true")

    assert "upload 'place': no file was written to it" in failed.reasons["write"]


@pytest.mark.parametrize(
    ("script", "told"),
    [('echo ours > "$1/a.txt"', "holds ['a.txt'] already"), ("true", "no file was written to it")],
)
def test_the_program_is_not_run_again_for_an_upload_that_would_be_refused_again(
    project, tmp_path, script, told
):
    project.place.mkdir(parents=True)
    (project.place / "a.txt").write_text("theirs")
    runs = tmp_path / "runs"

    failed = project.run(f"echo run >> {runs}; {script}", retries=2)

    assert failed.state == "failed"
    assert told in failed.reasons["write"]
    assert runs.read_text() == "run\n"


def test_nothing_is_uploaded_to_any_place_when_one_of_them_is_taken(project):
    project.second.mkdir(parents=True)
    (project.second / "b.txt").write_text("theirs")
    script = 'echo ours > "$1/a.txt"; echo ours > "$2/b.txt"'

    failed = project.run(script, second=True)

    assert "upload 'second'" in failed.reasons["write"]
    assert "holds ['b.txt'] already, with other content" in failed.reasons["write"]
    assert not project.place.exists()

    (project.second / "b.txt").unlink()
    assert project.run(script, second=True).state == "success"
    assert project.files() == {"a.txt": "ours\n"}
    assert (project.second / "b.txt").read_text() == "ours\n"


def test_it_may_write_at_a_path_of_its_own_choice(project):
    done = project.run("echo 1 > results/today/a", path_on_compute="results/today")

    assert done.state == "success"
    assert project.files() == {"a": "1\n"}


def test_beside_outputs_that_are_written_in_place(project, tmp_path):
    table = PipelineData("table")

    done = project.run(f'echo 1 > "$1/a"; echo 2 > {table}', outputs=[table])

    assert done.state == "success"
    assert project.files() == {"a": "1\n"}
    kept = [file.name for file in (tmp_path / "home").rglob("*") if "snapshots" not in file.parts]
    assert "table" in kept
    assert "place" not in kept


def test_one_name_for_an_upload_and_an_input_is_refused(project):
    ws = project.workspace()
    place = DataReference(ws.datastores["lake"], "place", "place")
    step = CommandStep(["true"], name="both", inputs=[place, place.as_upload("../up")])

    with pytest.raises(PipelineCheckError) as caught:
        Pipeline(ws, [step], name="wrong").to_dag()

    assert "upload 'place': is the name of another input or output too" in str(caught.value)
    assert "path_on_compute is '../up'" in str(caught.value)


def test_the_pipeline_of_the_guide_uploads_its_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlpipelines.yaml").write_text("name: g\ndatastores:\n  lake: {url: lake}\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "report.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[2], 'report.txt').write_text('well')\n"
    )
    (tmp_path / "uploads_dag.py").write_text(Path(__file__).with_name("uploads_dag.py").read_text())

    assert run_dag(runpy.run_path(str(tmp_path / "uploads_dag.py"))["dag"]).state == "success"
    assert (tmp_path / "lake/reports/latest/report.txt").read_text() == "well"
