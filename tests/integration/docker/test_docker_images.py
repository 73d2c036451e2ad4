"""Images of a real registry that asks who one is: by digest, and pulled with an Airflow connection."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import uuid
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.definition.graph import DockerComputeSpec, EnvironmentSpec
from airflow_mlpipelines.exceptions import EnvironmentBuildError
from tests.integration.docker.conftest import docker_cli
from tests.integration.docker.registry import PASSWORD, USER

if TYPE_CHECKING:
    from tests.integration.docker.registry import Registry

pytestmark = pytest.mark.docker
CONN_ID = "test_registry"


@pytest.fixture
def launcher(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> DockerLauncher:
    """A launcher whose compute has an Airflow connection for the registry."""
    connection = {
        "conn_type": "docker",
        "host": registry.address,
        "login": USER,
        "password": PASSWORD,
    }
    monkeypatch.setenv(f"AIRFLOW_CONN_{CONN_ID.upper()}", json.dumps(connection))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    return DockerLauncher(DockerComputeSpec(name="d", conn_id=CONN_ID))


def test_an_image_means_the_same_before_and_after_it_was_pulled(
    registry: Registry, launcher: DockerLauncher
) -> None:
    registry.push("one")
    environment = EnvironmentSpec(image=registry.image)
    planned = launcher.resolve_environment(environment)
    lines: list[str] = []
    prepared = launcher.prepare_environment(environment, planned, emit=lines.append)
    again = launcher.resolve_environment(environment)
    assert planned.cacheable
    assert planned.digest == prepared.digest == again.digest
    assert planned.image == f"{registry.address}/team/train@{planned.description['digest']}"
    assert any("Pull complete" in line for line in lines)
    assert docker_cli("inspect", "--format", "{{.Id}}", str(prepared.image))


def test_a_name_that_was_given_to_another_image_is_another_environment(
    registry: Registry, launcher: DockerLauncher
) -> None:
    environment = EnvironmentSpec(image=registry.image)
    registry.push("two")
    before = launcher.resolve_environment(environment)
    registry.push("three")
    after = launcher.resolve_environment(environment)
    assert before.digest != after.digest


def test_a_run_gets_the_image_that_it_was_planned_with(
    registry: Registry, launcher: DockerLauncher
) -> None:
    environment = EnvironmentSpec(image=registry.image)
    registry.push("planned")
    planned = launcher.resolve_environment(environment)
    registry.push("pushed while the run was on")
    prepared = launcher.prepare_environment(environment, planned, emit=print)
    container = docker_cli("create", str(prepared.image), "none")
    try:
        shown = subprocess.run(
            ["docker", "cp", f"{container}:/content", "-"], capture_output=True
        ).stdout
    finally:
        docker_cli("rm", container)
    with tarfile.open(fileobj=io.BytesIO(shown)) as archive:
        content = archive.extractfile("content")
        assert content is not None
        assert content.read() == b"planned"


def test_a_registry_that_refuses_is_told_apart_from_an_image_that_is_not_there(
    registry: Registry, launcher: DockerLauncher
) -> None:
    registry.push("one")
    stranger = DockerLauncher(DockerComputeSpec(name="d"))
    environment = EnvironmentSpec(image=registry.image)
    resolved = stranger.resolve_environment(environment)
    assert not resolved.cacheable
    with pytest.raises(EnvironmentBuildError, match="credentials"):
        stranger.prepare_environment(environment, resolved, emit=print)

    absent = EnvironmentSpec(image=f"{registry.address}/team/{uuid.uuid4().hex}:1")
    resolved = launcher.resolve_environment(absent)
    assert not resolved.cacheable
    with pytest.raises(EnvironmentBuildError, match="Check its name and tag"):
        launcher.prepare_environment(absent, resolved, emit=print)


def test_the_password_of_a_registry_is_in_no_error(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = {
        "conn_type": "docker",
        "host": registry.address,
        "login": USER,
        "password": "c4n4ry",
    }
    monkeypatch.setenv(f"AIRFLOW_CONN_{CONN_ID.upper()}", json.dumps(connection))
    launcher = DockerLauncher(DockerComputeSpec(name="d", conn_id=CONN_ID))
    resolved = launcher.resolve_environment(EnvironmentSpec(image=registry.image + "-absent"))
    assert not resolved.cacheable
    assert CONN_ID in str(resolved.problem)
    assert "c4n4ry" not in str(resolved.problem)
