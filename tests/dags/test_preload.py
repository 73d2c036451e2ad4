"""What Airflow's long-running components have loaded when they fork the first task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.airflow
START = """
import json, sys
from airflow_mlpipelines import preload

class Scheduler: pass
class TaskRunnerMarker: pass

preload.on_starting({component}())
names = {names!r}
json.dump([name in sys.modules for name in names], sys.stdout)
"""
STEPS = "airflow_mlpipelines.execution.program"
CLIENT = "kubernetes.client"
HOOK = "airflow.providers.cncf.kubernetes.hooks.kubernetes"
DOCKER = "docker.api.client"


def start(
    home: Path,
    component: str = "Scheduler",
    *,
    names: Sequence[str] = (STEPS, CLIENT, HOOK),
    **variables: str,
) -> tuple[list[bool], str]:
    """Return which of ``names`` a component has in memory once it has started, and what it said."""
    others = ("KUBE", "DOCKER_HOST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    program = START.format(component=component, names=names)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "HOME": str(home), "AIRFLOW_HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "loaded"),
    [
        ({}, [True, False, False]),
        ({"KUBECONFIG": "/somewhere/config"}, [True, True, False]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [True, True, False]),
        ({"AIRFLOW__MLPIPELINES__PRELOAD": "all"}, [True, True, True]),
        (
            {"KUBECONFIG": "/somewhere/config", "AIRFLOW__MLPIPELINES__PRELOAD": "none"},
            [False, False, False],
        ),
    ],
)
def test_the_kubernetes_client_is_loaded_where_there_is_a_cluster(
    tmp_path: Path, variables: dict[str, str], loaded: list[bool]
) -> None:
    assert start(tmp_path, **variables)[0] == loaded


@pytest.mark.parametrize(
    ("variables", "loaded"),
    [
        ({}, Path("/var/run/docker.sock").exists()),
        ({"DOCKER_HOST": "tcp://somewhere:2376"}, True),
        ({"AIRFLOW__MLPIPELINES__PRELOAD": "all"}, True),
        (
            {"DOCKER_HOST": "tcp://somewhere:2376", "AIRFLOW__MLPIPELINES__PRELOAD": "none"},
            False,
        ),
    ],
)
def test_the_docker_client_is_loaded_where_there_is_a_daemon(
    tmp_path: Path, variables: dict[str, str], loaded: bool
) -> None:
    assert start(tmp_path, names=[DOCKER], **variables)[0] == [loaded]


def test_a_users_own_kubeconfig_tells_that_there_is_a_cluster(tmp_path: Path) -> None:
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").touch()
    assert start(tmp_path)[0] == [True, True, False]


def test_a_task_loads_what_it_needs_by_itself(tmp_path: Path) -> None:
    assert start(tmp_path, "TaskRunnerMarker")[0] == [False, False, False]


def test_another_word_is_told_and_taken_for_the_default(tmp_path: Path) -> None:
    loaded, said = start(tmp_path, AIRFLOW__MLPIPELINES__PRELOAD="some")
    assert loaded == [True, False, False]
    assert "'some', which is none of auto, all, none" in said
