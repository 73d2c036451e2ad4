"""Images of a real registry that asks who one is: by digest, and pulled with an Airflow connection."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.definition.graph import DockerComputeSpec, EnvironmentSpec
from airflow_mlpipelines.exceptions import EnvironmentBuildError
from tests.integration.docker.conftest import docker_cli, wait_until
from tests.parts import missing, require_docker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.docker
USER, PASSWORD = "reader", "letmein"
HTPASSWD = "reader:$2y$05$T3.CB4tokmdLJTu.AGagDuxULMFpCLXRiRUkHpxjf.xP1.Et/F6mu"
CONN_ID = "test_registry"


@dataclass
class Registry:
    """A registry on this machine; the daemon trusts those without asking for a certificate."""

    address: str
    config: Path

    @property
    def image(self) -> str:
        return f"{self.address}/team/train:1"

    def push(self, content: str) -> None:
        """Put another image under the same name into the registry, and off the daemon."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo("content")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
        subprocess.run(
            ["docker", "import", "-", self.image],
            input=archive.getvalue(),
            check=True,
            capture_output=True,
        )
        environment = {**os.environ, "DOCKER_CONFIG": str(self.config)}
        subprocess.run(
            ["docker", "push", self.image], env=environment, check=True, capture_output=True
        )
        self.forget()

    def forget(self) -> None:
        """Take every image of this registry off the daemon."""
        found = docker_cli("images", "-q", f"{self.address}/*/*").split()
        if found:
            docker_cli("rmi", "-f", *found)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    require_docker()
    if shutil.which("docker-registry") is None:
        missing("no docker-registry (Debian has a package of that name)")
    root = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (root / "htpasswd").write_text(HTPASSWD + "\n")
    (root / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{root}/data'}}}}\n"
        f"auth: {{htpasswd: {{realm: tests, path: '{root}/htpasswd'}}}}\n"
    )
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (root / "config.json").write_text(json.dumps({"auths": {address: {"auth": token}}}))
    server = subprocess.Popen(
        ["docker-registry", "serve", str(root / "config.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    made = Registry(address, root)
    try:
        wait_until(lambda: _answers(address), "the registry answers")
        yield made
    finally:
        made.forget()
        server.kill()
        server.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{address}/v2/", timeout=1)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True


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
