"""A pipeline on an image that is built for it: from the command line, and run by Airflow twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.docker.cli import docker_cli
from tests.wheels import make_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.docker, pytest.mark.airflow]
ROOT = Path(__file__).parents[3]
PIPELINE = Path(__file__).with_name("environments_pipeline.py")
WORKSPACE = """
name: test
datastores: {store: {url: data}}
computes:
  here: {type: local}
  box: {type: docker, image: "python:3.11-slim"}
"""
BROKEN = """
from airflow_mlpipelines import CommandStep, Environment, Pipeline, Workspace

ws = Workspace.from_config()
broken = Environment("broken", dockerfile="FROM python:3.11-slim\\nRUN echo no such tool; exit 9\\n")
step = CommandStep(["true"], "use", environment=broken, compute_target="box", retries=1, retry_delay=1)
pipeline = Pipeline(ws, [step], name="on_a_broken_image")
"""


MOVING = """
from airflow_mlpipelines import (
    CommandStep, Environment, Pipeline, PipelineData, PipelineParameter, Workspace
)

ws = Workspace.from_config()
one, two = PipelineData("one"), PipelineData("two")
onto = PipelineParameter("onto", "none")
move = CommandStep(["docker", "tag", onto, "TAG"], "move", compute_target="here", allow_reuse=False)
plain = CommandStep(
    ["sh", "-c", 'echo it is $TURN | tee "$0"', one],
    "plain",
    outputs=[one],
    environment=Environment(image="TAG"),
    compute_target="box",
)
built = CommandStep(
    ["sh", "-c", 'echo it is $TURN and checked | tee "$0"', two],
    "built",
    outputs=[two],
    environment=Environment(image="TAG", python_version="3.11"),
    compute_target="box",
)
plain.run_after(move)
built.run_after(move)
pipeline = Pipeline(ws, [move, plain, built], name="moving")
"""


@dataclass
class Project:
    """A folder with a workspace, a pipeline and the packages that it wants."""

    folder: Path
    images: set[str] = field(default_factory=set)

    @property
    def file(self) -> Path:
        return self.folder / PIPELINE.name

    def call(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Call ``mlpipelines`` in a process of its own, on an Airflow of this project's own."""
        done = subprocess.run(
            [sys.executable, "-c", "from airflow_mlpipelines.cli import main; main()"]
            + [str(argument) for argument in arguments],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "AIRFLOW_HOME": str(self.folder / "airflow"),
                "AIRFLOW__CORE__DAGS_FOLDER": str(self.folder),
                "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.folder}/airflow.db",
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=240,
        )
        self.images |= set(re.findall(r"mlpipelines/(?:env|base):\w+", done.stdout + done.stderr))
        return done

    def ask(self, *arguments: object) -> Any:
        done = self.call(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def project(tmp_path: Path, image: str) -> Iterator[Project]:
    assert image in WORKSPACE
    (tmp_path / "mlpipelines.yaml").write_text(WORKSPACE)
    (tmp_path / PIPELINE.name).write_text(PIPELINE.read_text())
    (tmp_path / "wheels").mkdir()
    # Another one each time, as BuildKit remembers what it has built.
    make_wheel(tmp_path / "wheels", "1.0", body=f"# {uuid.uuid4()}\n")
    made = Project(tmp_path)
    try:
        yield made
    finally:
        for name in made.images:
            docker_cli("rmi", "-f", name)


def test_the_command_line_shows_builds_and_exports_an_environment(project: Project) -> None:
    [before] = project.ask("environment", "ls", project.file)
    assert (before["environment"], before["compute"], before["state"]) == (
        "training",
        "box",
        "not built",
    )
    assert before["steps"] == ["train"]
    assert before["digest"] == f"definition:{before['image'].partition(':')[2]}"

    built = project.call("environment", "build", project.file)
    assert built.returncode == 0
    assert "Successfully installed tinypkg-1.0" in built.stderr
    assert "training" in built.stdout
    [after] = project.ask("environment", "ls", project.file)
    assert after == {**before, "state": "ready"}

    shown = project.call("environment", "show", project.file, "--environment", "train").stdout
    assert "state: ready" in shown
    assert "tinypkg  ==1.0" in shown
    assert "python3 -m pip install" in shown

    made = project.ask("environment", "export", project.file, project.folder / "context")
    assert made["image"] == before["image"]
    lines = (project.folder / "context" / "pip" / "requirements.txt").read_text().splitlines()
    assert lines[-1] == "tinypkg==1.0"
    assert list((project.folder / "context").rglob("tinypkg-1.0-py3-none-any.whl"))
    again = subprocess.run(
        ["docker", "build", "-q", str(project.folder / "context")],
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    docker_cli("rmi", "-f", again.stdout.strip())


def test_airflow_builds_the_image_once_and_reuses_what_was_made_on_it(project: Project) -> None:
    first = project.call("run", project.file)
    assert first.returncode == 0, first.stderr
    assert "train | Building image mlpipelines/env:" in first.stderr
    said = " ".join(first.stderr.split())
    assert re.search(r"train \|( #\d+ [\d.]+)? Successfully installed tinypkg-1\.0", said), said

    second = project.call("run", project.file)
    assert second.returncode == 0, second.stderr
    assert "reused" in second.stdout
    assert "Building" not in second.stderr

    make_wheel(project.folder / "wheels", "1.0", body="# another build of it\n")
    [step] = project.ask("plan", project.file)["steps"]
    assert step["decision"] == "run"
    assert "has another digest" in step["reason"]


def test_an_image_that_can_not_be_built_is_tried_once_and_the_step_says_why(
    project: Project,
) -> None:
    file = project.folder / "broken.py"
    file.write_text(BROKEN)
    done = project.call("run", file, "--json")
    assert done.returncode == 1
    assert done.stderr.count("no such tool") >= 1
    assert done.stderr.count("Building image") == 1
    [step] = json.loads(done.stdout.splitlines()[-1])["steps"]
    assert step["state"] == "failed"
    assert step["reason"].startswith(
        "environment 'broken' can't be built: it ended with exit code 9. The instruction was: RUN"
    )
    built = project.call("environment", "build", file)
    assert built.returncode == 1
    assert "End of the build's log:" in built.stderr


def test_a_tag_that_moves_while_a_run_is_on_changes_nothing_in_it(project: Project) -> None:
    tag = f"mlpipelines-test/{uuid.uuid4().hex[:12]}:1"
    file = project.folder / "moving.py"
    file.write_text(MOVING.replace("TAG", tag))
    bases = [commit("one"), commit("two")]
    try:
        docker_cli("tag", bases[0], tag)
        done = project.call("run", file, "-p", f"onto={bases[1]}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "plain | it is one" in done.stderr
        assert "built | it is one and checked" in done.stderr

        again = project.call("run", file, "-p", f"onto={bases[1]}")
        assert "plain | it is two" in again.stderr
        assert "built | it is two and checked" in again.stderr
    finally:
        docker_cli("rmi", "-f", tag, *project.images, *bases)


def commit(turn: str) -> str:
    """Return the id of an image that knows its turn."""
    container = docker_cli("create", "python:3.11-slim", "none")
    try:
        return docker_cli("commit", f"--change=ENV TURN={turn}", container)
    finally:
        docker_cli("rm", container)
