"""A real registry on this machine that asks who one is."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.docker.cli import docker_cli, wait_until
from tests.parts import missing, require_docker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER, PASSWORD = "reader", "letmein"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
HTPASSWD = "reader:$2y$05$T3.CB4tokmdLJTu.AGagDuxULMFpCLXRiRUkHpxjf.xP1.Et/F6mu"


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
        self.push_from_daemon(self.image)
        self.forget()

    def push_from_daemon(self, image: str) -> None:
        """Put an image of the daemon, whose name begins with the address, into the registry."""
        environment = {**os.environ, "DOCKER_CONFIG": str(self.config)}
        subprocess.run(["docker", "push", image], env=environment, check=True, capture_output=True)

    def move_tag(self, digest: str) -> None:
        """Let the image's tag mean another manifest of its repository, as a push from elsewhere does."""
        manifests = f"http://{self.address}/v2/team/train/manifests"
        with httpx.Client(auth=(USER, PASSWORD), trust_env=False) as client:
            found = client.get(f"{manifests}/{digest}", headers={"Accept": MANIFEST})
            done = client.put(
                f"{manifests}/1", content=found.content, headers={"Content-Type": MANIFEST}
            )
        assert done.is_success, done.text

    @contextmanager
    def pulled(self) -> Iterator[str]:
        """Have the image on the daemon for a while; give its reference by digest."""
        environment = {**os.environ, "DOCKER_CONFIG": str(self.config)}
        subprocess.run(
            ["docker", "pull", "-q", self.image], env=environment, check=True, capture_output=True
        )
        try:
            yield docker_cli("inspect", "--format", "{{index .RepoDigests 0}}", self.image)
        finally:
            self.forget()

    def forget(self) -> None:
        """Take every image of this registry off the daemon."""
        # By name: the image itself may have other ones, which stay.
        form = "{{.Repository}} {{.Tag}} {{.Digest}}"
        for line in docker_cli("images", "--digests", "--format", form).splitlines():
            repository, tag, digest = line.split()
            if repository.startswith(f"{self.address}/"):
                name = f"{repository}@{digest}" if tag == "<none>" else f"{repository}:{tag}"
                docker_cli("rmi", "-f", name)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    require_docker()
    root = tmp_path_factory.mktemp("registry")
    (root / "htpasswd").write_text(HTPASSWD + "\n")
    with serve_registry(root, f"htpasswd: {{realm: tests, path: '{root}/htpasswd'}}") as address:
        (root / "config.json").write_text(docker_config(address))
        made = Registry(address, root)
        try:
            yield made
        finally:
            made.forget()


def docker_config(address: str) -> str:
    """Return the configuration of a Docker client that is logged in at the registry."""
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return json.dumps({"auths": {address: {"auth": token}}})


@contextmanager
def serve_registry(root: Path, auth: str, *, data: Path | None = None) -> Iterator[str]:
    """Run a registry with its own ``auth`` section, and yield its address.

    Pods of the tests' cluster reach it too, at another address of this machine.
    """
    if shutil.which("docker-registry") is None:
        missing("no docker-registry (Debian has a package of that name)")
    with socket.create_server(("0.0.0.0", 0)) as probe:
        port = probe.getsockname()[1]
    (root / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: ':{port}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{data or root / 'data'}'}}}}\n"
        f"auth: {{{auth}}}\n"
    )
    server = subprocess.Popen(
        ["docker-registry", "serve", str(root / "config.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _answers(f"127.0.0.1:{port}"), "the registry answers")
        yield f"127.0.0.1:{port}"
    finally:
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
