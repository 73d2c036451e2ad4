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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.integration.docker.cli import docker_cli, wait_until
from tests.parts import missing, require_docker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER, PASSWORD = "reader", "letmein"
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
