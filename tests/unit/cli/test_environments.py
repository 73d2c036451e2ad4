"""``mlpipelines environment`` without containers: environments of a workspace, and of processes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from airflow_mlpipelines.compute.environment_locks import run_uv
from tests.wheels import make_wheel

WORKSPACE = """
name: test
computes:
  local: {{type: local}}
  pods: {{type: kubernetes, image: "python:3.11"}}
environments:
  tiny: {{pip: ["--no-index", "--find-links={wheels}", tinypkg]}}
  plain: {{environment_variables: {{LEVEL: info}}}}
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a workspace file that names environments."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "1.0")
    (tmp_path / "mlpipelines.yaml").write_text(WORKSPACE.format(wheels=wheels))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_environments_of_a_workspace_are_listed_on_its_default_compute(workspace, mlpipelines):
    found = mlpipelines("environment", "ls", "--json").json
    assert [(item["environment"], item["compute"], item["state"]) for item in found] == [
        ("tiny", "local", "not built"),
        ("plain", "local", "ready"),
    ]
    assert mlpipelines("environment", "ls", workspace / "mlpipelines.yaml", "--json").json == found

    [there, _] = mlpipelines("environment", "ls", "--compute", "pods", "--json").json
    assert there["compute"] == "pods"
    assert "none is named. Write `registry:" in there["problem"]

    wrong = mlpipelines("environment", "ls", "--compute", "pod")
    assert wrong.code == 2
    assert "Did you mean 'pods'?" in wrong.err


def test_the_lock_of_an_environment_for_processes_is_exported(workspace, mlpipelines):
    made = mlpipelines("environment", "export", ".", "out", "-e", "tiny")
    assert made.code == 0, made.err
    commands = made.out.splitlines()
    assert commands[0].startswith("uv venv --python 3.")
    assert "tinypkg" in (workspace / "out" / "pylock.toml").read_text()
    for command in commands:
        program, *arguments = command.split()
        assert program == "uv"
        run_uv(arguments, "uv fails", workspace)
    python = workspace / "out" / "made" / "bin" / "python"
    shown = subprocess.run(
        [python, "-c", "import tinypkg; print(tinypkg.VERSION)"], capture_output=True, text=True
    )
    assert shown.stdout == "1.0\n"
    again = mlpipelines("environment", "export", ".", "out", "-e", "tiny")
    assert again.code == 2
    assert "is not empty" in again.err
    plain = mlpipelines("environment", "export", ".", Path("other"), "-e", "plain")
    assert "['plain'] is made from a definition" in plain.err
