"""The compose file: well formed, complete, and honest about the Docker socket."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_every_component_of_airflow_is_there(services):
    commands = {name: " ".join(service.get("command", [])) for name, service in services.items()}

    assert commands == {
        "postgres": "",
        "redis": "",
        "migrate": "airflow db migrate",
        "api-server": "airflow api-server",
        "scheduler": "airflow scheduler",
        "dag-processor": "airflow dag-processor",
        "triggerer": "airflow triggerer",
        "worker": "airflow celery worker",
    }


def test_only_the_worker_has_the_docker_socket(services):
    with_socket = {
        name
        for name, service in services.items()
        if any("docker.sock" in volume for volume in service.get("volumes", []))
    }

    assert with_socket == {"worker"}
    assert "ROOT ON ITS HOST" in COMPOSE.read_text()


def test_files_that_it_mounts_are_there(services):
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source


def test_the_ui_is_published_to_this_machine_only(services):
    published = [port for service in services.values() for port in service.get("ports", [])]

    assert all(port.startswith("127.0.0.1:") for port in published)


def test_compose_itself_accepts_it():
    program = [["docker", "compose"], ["docker-compose"]]
    for command in program:
        if shutil.which(command[0]) is None:
            continue
        probe = subprocess.run([*command, "version"], capture_output=True, check=False)
        if probe.returncode == 0:
            done = subprocess.run(
                [*command, "-f", str(COMPOSE), "config", "--quiet"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return
    pytest.skip("docker compose is not installed; the structure was checked")
