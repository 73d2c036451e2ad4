"""A real Docker daemon of a test's own that takes requests for GPUs, on a machine that has none.

A daemon hands GPUs out through a program of NVIDIA's that it finds on its PATH. Here that program does nothing: the
containers get no devices, but whatever their requests say reaches them, as with GPUs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.integration.docker.cli import docker_cli, wait_until
from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUSYBOX = "busybox:1.36"
_HOOK = "nvidia-container-runtime-hook"


@dataclass
class GpuDaemon:
    """Where it listens: on a socket of this machine, and on a port, as if it were elsewhere."""

    socket: str
    remote: str


@contextmanager
def gpu_daemon(root: Path, port: int) -> Iterator[GpuDaemon]:
    """Run a daemon that takes requests for GPUs, with the image busybox; at the end nothing of it is left."""
    if shutil.which("dockerd") is None or os.getuid() != 0:
        missing("no dockerd that a test could start")
    if shutil.which("ip") is None:
        missing("no ip, which makes a bridge")
    if not docker_cli("images", "-q", BUSYBOX):
        missing(f"the Docker daemon has no image {BUSYBOX} (.ci/busybox-image.sh makes one)")
    programs = root / "bin"
    programs.mkdir(parents=True)
    hook = programs / _HOOK
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    daemon = GpuDaemon(f"unix://{root}/docker.sock", f"tcp://127.0.0.1:{port}")
    command = ["dockerd", "--data-root", f"{root}/data", "--exec-root", f"{root}/exec"]
    command += ["--pidfile", f"{root}/pid", "-H", daemon.socket, "-H", daemon.remote, "--tls=false"]
    command += [
        "--containerd-namespace",
        root.name,
        "--containerd-plugins-namespace",
        f"{root.name}-p",
    ]
    # With none, it would remove the one that it finds: docker0, of the machine's own daemon.
    bridge = f"mlp-{os.getpid()}"
    command += ["--bridge", bridge, "--iptables=false", "--ip6tables=false"]
    command += ["--default-address-pool", "base=10.231.0.0/16,size=24"]
    log = root / "log"
    _ip("link", "add", bridge, "type", "bridge")
    _ip("address", "add", "10.230.255.1/24", "dev", bridge)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: (
                process.poll() is not None
                or docker_cli("-H", daemon.socket, "version", "-f", "{{.Server.Version}}")
            ),
            "the daemon answers",
        )
        assert process.poll() is None, log.read_text()[-2000:]
        save = subprocess.Popen(["docker", "save", BUSYBOX], stdout=subprocess.PIPE)
        subprocess.run(
            ["docker", "-H", daemon.socket, "load"], stdin=save.stdout, check=True, timeout=60
        )
        save.wait(60)
        yield daemon
    finally:
        left = docker_cli("-H", daemon.socket, "ps", "-aq").split()
        if left:
            docker_cli("-H", daemon.socket, "rm", "-f", *left)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        # One that did not come up leaves its folder mounted on itself.
        subprocess.run(["umount", f"{root}/data"], capture_output=True, check=False)
        shutil.rmtree(root, ignore_errors=True)
        _ip("link", "delete", bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)
