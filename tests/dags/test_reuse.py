"""What reruns exactly which steps: each test changes one thing between two real runs."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from airflow_mlpipelines import CommandStep, Environment, Pipeline, PipelineData, Workspace
from tests.dags.project import Project, run_dag
from tests.wheels import make_wheel

pytestmark = [pytest.mark.airflow, pytest.mark.usefixtures("airflow_db")]


@pytest.fixture
def project(tmp_path):
    """A project whose pipeline has run once."""
    project = Project(tmp_path)
    first = project.run()
    assert first.state == "success"
    assert first.ran == {"clean", "train", "report"}
    return project


def test_nothing_changed_and_nothing_reruns(project):
    outcome = project.run()

    assert outcome.state == "success"
    assert outcome.ran == set()


def test_the_script_reruns_its_step(project):
    project.edit("clean.py", "tidy(source.read())", "tidy(source.read().upper())")

    assert project.run().ran == {"clean", "train", "report"}


def test_an_imported_module_reruns_the_step_that_reaches_it(project):
    project.edit("helpers/text.py", "text.split()", "text.lower().split()")

    outcome = project.run()

    assert outcome.ran == {"clean"}  # the same bytes came out: early cutoff
    assert "helpers/text.py changed" in outcome.reasons["clean"]


def test_a_module_that_an_imported_module_imports_reruns_the_step(project):
    project.edit("helpers/rules.py", '" "', '"-"')

    outcome = project.run()

    assert outcome.ran == {"clean", "train"}  # and train made the same bytes as before
    assert outcome.reasons["clean"] == "helpers/rules.py changed (via helpers/text.py)"
    assert outcome.reasons["train"] == "input 'table' has other content"


def test_a_data_file_beside_the_scripts_reruns_the_steps_of_the_folder(project):
    project.write("words.txt", "air plane\n")

    outcome = project.run()

    assert outcome.ran == {"clean", "train", "report"}  # the folder is theirs together
    assert "words.txt changed" in outcome.reasons["train"]


def test_a_comment_reruns_nothing(project):
    project.edit("train.py", "import argparse", "# a remark\nimport argparse")

    assert project.run().ran == set()


def test_another_step_s_script_in_the_same_folder_reruns_only_that_step(project):
    project.edit("report.py", "the model says", "the new model says")

    assert project.run().ran == {"report"}


def test_an_argument_reruns_its_step(project):
    project.tag = "v2"

    assert project.run().ran == {"train", "report"}


def test_a_parameter_reruns_the_steps_that_use_it(project):
    outcome = project.run(rate=0.25)

    assert outcome.ran == {"train", "report"}
    assert "rate 0.5 -> 0.25" in outcome.reasons["train"]


def test_another_version_of_a_library_reruns_the_steps_of_its_environment(tmp_path):
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path, version)

    def train_with(version):
        packages = ["--no-index", f"--find-links={tmp_path}", f"tinypkg=={version}"]
        return {"train": {"environment": Environment(pip=packages)}}

    project = Project(tmp_path, options=train_with("1.0"))
    project.edit("train.py", "import argparse", "import tinypkg, argparse")
    assert project.run().ran == {"clean", "train", "report"}
    assert project.run().ran == set()

    project.options = train_with("2.0")
    outcome = project.run()

    assert outcome.ran == {"train"}  # and it made the same bytes as before
    assert outcome.reasons["train"] == "tinypkg 1.0 -> 2.0"


def test_input_bytes_of_the_same_size_and_time_rerun_the_step(project):
    before = project.data.stat()
    project.write_data("air  porT\nair plane\n")
    os.utime(project.data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert project.data.stat().st_size == before.st_size

    assert project.run().ran == {"clean", "train", "report"}


def test_a_touched_file_reruns_nothing(project):
    os.utime(project.data)
    os.utime(project.root / "code" / "train.py")

    assert project.run().ran == set()


def test_moved_input_reruns_nothing(project):
    moved = project.root / "data" / "elsewhere" / "2013.txt"
    moved.parent.mkdir()
    shutil.move(project.data, moved)
    project.data_path = "elsewhere/2013.txt"

    assert project.run().ran == set()


def test_a_deleted_output_is_made_again_by_its_step_alone(project):
    first = project.run()
    model = first.outputs["train"]["model"]["uri"].removeprefix("file://")
    shutil.rmtree(model)

    outcome = project.run()

    assert outcome.ran == {"train"}
    assert "model" in outcome.reasons["train"]
    assert project.run().ran == set()


def test_allow_reuse_false_runs_every_time_and_cuts_off_below(project):
    project.options = {"clean": {"allow_reuse": False}}
    project.run()

    assert project.run().ran == {"clean"}


@pytest.mark.parametrize(
    ("asked", "ran"), [(["all"], {"clean", "train", "report"}), (["train"], {"train"})]
)
def test_regenerate_outputs_runs_what_it_names(project, asked, ran):
    assert project.run(regenerate_outputs=asked).ran == ran


def test_a_failed_step_fails_the_run_and_what_succeeded_is_reused(project):
    project.edit("train.py", "score = ", "raise SystemExit(3)\nscore = ")
    failed = project.run()
    assert failed.state == "failed"
    assert failed.steps["train"] == "failed"
    assert failed.steps["report"] == "upstream_failed"

    project.edit("train.py", "raise SystemExit(3)\n", "")

    assert project.run().ran == set()


def test_a_step_can_not_change_what_another_one_gets_but_in_a_copy_of_its_own(tmp_path):
    (tmp_path / "mlpipelines.yaml").write_text("name: w\ndatastores:\n  here: {url: data}\n")
    workspace = Workspace.from_config(tmp_path)
    words, mine, seen = (PipelineData(name) for name in ("words", "mine", "seen"))
    make = CommandStep(
        ["sh", "-c", f"printf 'one ' > {words}; chmod 775 {words}"], name="make", outputs=[words]
    )
    append = CommandStep(
        ["sh", "-c", f"(stat -c %a {words}; printf two >> {words}; cat {words}) > {mine}"],
        name="append",
        inputs=[words.as_download()],
        outputs=[mine],
    )
    look = CommandStep(
        ["sh", "-c", f"(stat -c %a {words}; cat {words} {mine}) > {seen}"],
        name="look",
        inputs=[words, mine],
        outputs=[seen],
    )

    done = run_dag(Pipeline(workspace, [make, append, look], name=f"own_{tmp_path.name}").to_dag())

    place = Path(unquote(urlsplit(done.outputs["look"]["seen"]["uri"]).path))
    assert place.read_text() == "555\none 755\none two"
    assert stat.S_IMODE(place.stat().st_mode) & 0o222 == 0
