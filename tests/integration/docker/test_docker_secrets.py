"""A step gets its secrets, and nobody else does."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.exceptions import StepFailedError
from tests.integration.docker.conftest import docker_cli, wait_until

if TYPE_CHECKING:
    from tests.integration.docker.conftest import DockerStep

pytestmark = pytest.mark.docker
CANARY = "c4n4ry'\"$(touch /mlp/run/pwned)`\\\nsecond line ✓"
MARK = "c4n4ry"


def test_a_secret_reaches_the_program_as_it_is(step: DockerStep) -> None:
    program = "import os, json; print(json.dumps(os.environ['TOKEN']))"
    (line,) = step.run(step.python(program, secrets={"TOKEN": CANARY}))
    assert json.loads(line) == CANARY
    assert list(step.stage.run.iterdir()) == []


def test_a_secret_is_seen_in_nothing_that_docker_shows(step: DockerStep) -> None:
    launch = step.launch("sh", "-c", "echo ready; sleep 60", secrets={"TOKEN": CANARY})
    launcher, thread, _ = step.run_in_thread(launch)
    wait_until(lambda: "ready" in step.lines, "the program runs")
    shown = [
        docker_cli("inspect", step.name),
        docker_cli("ps", "-a", "--no-trunc", "--filter", f"name={step.name}"),
        docker_cli("top", step.name, "-o", "pid,args"),
        docker_cli("logs", step.name),
        docker_cli("exec", step.name, "ls", "-R", "/mlp/secrets"),
    ]
    exported = subprocess.run(["docker", "export", step.name], capture_output=True).stdout
    launcher.kill()
    thread.join(10)
    assert all(text for text in shown)
    assert MARK not in "".join(shown)
    assert len(exported) > 1_000_000
    assert MARK.encode() not in exported


def test_a_secret_is_in_no_file_on_the_worker(step: DockerStep) -> None:
    launch = step.launch("sh", "-c", "echo ready; sleep 60", secrets={"TOKEN": CANARY})
    launcher, thread, _ = step.run_in_thread(launch)
    wait_until(lambda: "ready" in step.lines, "the program runs")
    files = [path for path in step.root.rglob("*") if path.is_file()]
    found = [path for path in files if MARK.encode() in path.read_bytes()]
    launcher.kill()
    thread.join(10)
    assert files
    assert found == []


def test_a_secret_is_not_in_the_error_of_a_step_that_fails(step: DockerStep) -> None:
    with pytest.raises(StepFailedError) as caught:
        step.run(step.launch("false", secrets={"TOKEN": CANARY}))
    assert MARK not in str(caught.value)


def test_arguments_are_not_interpreted_when_there_are_secrets(step: DockerStep) -> None:
    arguments = ["$(id)", "`id`", "; id", "a\nb", "", "--flag", "*", "it's"]
    program = "import sys, json; print(json.dumps(sys.argv[1:]))"
    launch = step.launch("python3", "-c", program, *arguments, secrets={"TOKEN": "x"})
    (line,) = step.run(launch)
    assert json.loads(line) == arguments


def test_the_exit_code_is_the_programs_own_when_there_are_secrets(step: DockerStep) -> None:
    with pytest.raises(StepFailedError) as caught:
        step.run(step.python("raise SystemExit(42)", secrets={"TOKEN": "x"}))
    assert caught.value.exit_code == 42
