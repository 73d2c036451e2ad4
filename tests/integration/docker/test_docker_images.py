"""Images of a real registry that asks who one is: by digest, and pulled with an Airflow connection."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import tarfile
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher, images
from airflow_mlpipelines.definition.graph import DockerComputeSpec, EnvironmentSpec
from airflow_mlpipelines.exceptions import EnvironmentBuildError
from tests.integration.docker.conftest import docker_cli
from tests.integration.docker.registry import (
    HTPASSWD,
    PASSWORD,
    USER,
    Registry,
    docker_config,
    serve_registry,
)

if TYPE_CHECKING:
    from pathlib import Path

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


def test_a_tag_that_moved_is_seen_though_the_daemon_has_an_old_copy(
    registry: Registry, launcher: DockerLauncher
) -> None:
    environment = EnvironmentSpec(image=registry.image)
    registry.push("two")
    two = launcher.resolve_environment(environment)
    registry.push("one")
    with registry.pulled() as one:
        before = launcher.resolve_environment(environment)
        assert before.image == one
        registry.move_tag(str(two.description["digest"]))
        after = launcher.resolve_environment(environment)
        assert (after.image, after.digest) == (two.image, two.digest)
        prepared = launcher.prepare_environment(environment, after, emit=print)
        assert docker_cli("inspect", "--format", "{{.Id}}", str(prepared.image))
        # A run that was planned before keeps what it found.
        recalled = launcher.recall_environment(environment, before.description)
        assert recalled is not None
        assert (recalled.image, recalled.digest) == (one, before.digest)


def test_a_registry_that_is_away_is_waited_for_once_and_the_copy_on_the_daemon_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD + "\n")
    with serve_registry(tmp_path, f"htpasswd: {{realm: tests, path: '{tmp_path}/htpasswd'}}") as at:
        (tmp_path / "config.json").write_text(docker_config(at))
        other = Registry(at, tmp_path)
        other.push("one")
        environment = {**os.environ, "DOCKER_CONFIG": str(tmp_path)}
        pull = ["docker", "pull", "-q", other.image]
        subprocess.run(pull, env=environment, check=True, capture_output=True)
    names = [other.image, other.image.replace(":1", ":2")]
    docker_cli("tag", *names)
    known = docker_cli("inspect", "--format", "{{index .RepoDigests 0}}", other.image)
    launcher = DockerLauncher(DockerComputeSpec(name="d"))
    try:
        # Somebody listens there and says nothing, as behind a firewall.
        with socket.create_server(("127.0.0.1", int(at.rpartition(":")[2]))):
            began = time.monotonic()
            found = [launcher.resolve_environment(EnvironmentSpec(image=name)) for name in names]
            took = time.monotonic() - began
        assert [item.image for item in found] == [known, known]
        assert all(item.cacheable for item in found)
        assert took < 2 * images._ASK_SECONDS
        told = [record.getMessage() for record in caplog.records if record.name == images.__name__]
        assert len(told) == 2
        assert f"The tag of image '{names[0]}' can't be looked up" in told[0]
        assert known.partition("@")[2] in told[0]
    finally:
        images._silent.clear()
        other.forget()


def test_an_image_that_was_made_here_is_asked_of_nobody(
    image: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"127.0.0.1:9/mlpipelines-test/{uuid.uuid4().hex}:1"
    docker_cli("tag", image, name)
    try:
        found = DockerLauncher(DockerComputeSpec(name="d")).resolve_environment(
            EnvironmentSpec(image=name)
        )
    finally:
        docker_cli("rmi", name)
    assert found.cacheable
    assert not caplog.records


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
