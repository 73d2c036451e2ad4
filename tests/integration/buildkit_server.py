"""A real BuildKit daemon on this machine, without any Docker daemon behind it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSION = "0.25.0"
START_SECONDS = 60.0


@dataclass
class Buildkit:
    """A daemon that listens at ``host``; ``programs`` is where its client is."""

    host: str
    programs: Path
    log: Path


def find_programs() -> Path:
    """Return the directory with ``buildkitd`` and ``buildctl``, or skip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    programs = cache / "mlpipelines-tests" / f"buildkit-{VERSION}"
    if not (programs / "buildkitd").exists():
        missing("no buildkitd (.ci/buildkit.sh builds it)")
    if shutil.which("runc") is None:
        missing("no runc, which buildkitd runs instructions with")
    if os.getuid() != 0:
        missing("only root may run buildkitd here")
    return programs


@contextmanager
def serve_buildkit(root: Path, *options: str) -> Iterator[Buildkit]:
    """Run a BuildKit daemon that keeps its things below ``root``."""
    programs = find_programs()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    host = f"tcp://127.0.0.1:{port}"
    # Its own options alone count, not those of a daemon that this machine may have.
    (root / "buildkitd.toml").write_text("")
    command: Sequence[str] = [
        str(programs / "buildkitd"),
        f"--config={root / 'buildkitd.toml'}",
        f"--root={root / 'state'}",
        f"--addr={host}",
        "--containerd-worker=false",
        "--oci-worker-snapshotter=auto",
        "--oci-worker-net=host",
        *options,
    ]
    log = root / "buildkitd.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        _await_port(server, port, log)
        yield Buildkit(host, programs, log)
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _await_port(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"buildkitd does not answer: {log.read_text()[-2000:]}")
