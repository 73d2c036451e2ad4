"""``mlpipelines demo``, as a new user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.stack

_SECONDS = 300


def processes_of(home):
    """Return the processes that were started for the Airflow of this home."""
    wanted = f"AIRFLOW_HOME={home}".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:  # ended meanwhile, or is another user's
            continue
    return found


def test_the_demo_runs_twice_reuses_what_did_not_change_and_leaves_nothing_running(tmp_path):
    home = tmp_path / "home"
    environment = {name: value for name, value in os.environ.items() if "AIRFLOW" not in name}
    program = Path(sys.executable).with_name("mlpipelines")

    done = subprocess.run(
        [program, "demo", "--home", home],
        env={**environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    table = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for step in ("ingest", "clean", "features", "train_linear"):
        assert " reused " in table[step], table[step]
    assert "learning_rate 0.1 -> 0.2" in table["train_boosted"]
    assert "evaluate.py changed" in table["evaluate"]
    assert "of 7 steps were reused" in done.stdout
    assert processes_of(home) == []


def test_a_folder_that_is_somebody_else_s_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")

    done = subprocess.run(
        [Path(sys.executable).with_name("mlpipelines"), "demo", "--home", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode != 0
    assert "choose another folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
