"""A second Docker daemon on this machine, with containers and images of its own: another host, to all who use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_SECONDS = 60.0


class SecondDaemon:
    """The daemon; :attr:`socket` is where it listens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "docker.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def cli(self, *arguments: str) -> str:
        """Return what the Docker command line prints of it."""
        command = ["docker", "--host", self.url, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def take(self, image: str) -> None:
        """Copy an image from the machine's own daemon."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            load = ["docker", "--host", self.url, "load", "--quiet"]
            subprocess.run(load, stdin=saved.stdout, check=True, timeout=120)


@contextmanager
def start_second_daemon() -> Iterator[SecondDaemon]:
    """Have one run until the end of the block; without any network, and with nothing left afterwards.

    In namespaces of its own: a daemon without a bridge removes the one that it finds, which is the other daemon's.
    """
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        missing("no dockerd, or not root, who alone can start one")
    folder = Path(
        tempfile.mkdtemp(prefix="mlp-dockerd-")
    )  # a socket's path may have 107 characters
    daemon = SecondDaemon(folder)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *("unshare", "--net", "--mount"),
                *("dockerd", "--host", daemon.url, "--pidfile", folder / "pid"),
                *("--data-root", folder / "data", "--exec-root", folder / "exec"),
                *("--storage-driver", "vfs", "--bridge", "none", "--iptables=false"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not daemon.cli("info", "--format", "{{.ID}}"):
            if process.poll() is not None or time.monotonic() > deadline:
                missing(f"no second Docker daemon: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield daemon
    finally:
        for container in daemon.cli("ps", "--all", "--quiet").split():
            daemon.cli("rm", "--force", "--volumes", container)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
