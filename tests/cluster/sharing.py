"""The Kubernetes that tests run on: the one that is there, or one that a test session starts and shares."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest
from filelock import FileLock

from tests.parts import missing, require_docker

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = Path(__file__).parent
IMAGES = {
    "python:3.11-slim": ".ci/python-image.sh",
    "busybox:1.36": ".ci/busybox-image.sh",
}
"""What pods of tests run, and the script that makes it where it can't be pulled."""

PROGRAMS = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "openssl": "openssl",
    "curl": "curl",
    "unshare": "util-linux",
}
"""What a cluster is made of, beside our own binaries, and the package that brings it."""

BUILD_SECONDS = 1500


@dataclass(frozen=True)
class ClusterAccess:
    """A cluster that answers.

    ``host_address`` is the address at which its pods reach servers of this machine, if that is known. ``state`` is
    the folder of a cluster that a test session started.
    """

    kubeconfig: Path
    host_address: str | None = None
    state: Path | None = None

    def load_image(self, image: str) -> None:
        """Let pods find an image of the Docker daemon, where this cluster was started by a test session."""
        if self.state is None:
            return
        socket = self.state / "containerd.sock"
        done = _run(
            "bash",
            "-c",
            'docker save "$1" | ctr --address "$0" --namespace k8s.io images import -',
            socket,
            image,
            seconds=200,
        )
        if done.returncode != 0:
            pytest.fail(f"the image {image} can't be copied to the cluster:\n{done.stderr[-3000:]}")

    def pin_image(self, image: str) -> str:
        """Return the name by digest of an image that pods of a cluster started here find.

        Only a step on an image that is named so is reused where no registry tells what a tag means.
        """
        assert self.state is not None
        ctr = (
            "ctr",
            "--address",
            self.state / "containerd.sock",
            "--namespace",
            "k8s.io",
            "images",
        )
        name = f"docker.io/library/{image}"
        listed = _run(*ctr, "list", f"name=={name}").stdout.splitlines()[1:]
        (digest,) = (word for line in listed for word in line.split() if word.startswith("sha256:"))
        pinned = f"{name.rpartition(':')[0]}@{digest}"
        done = _run(*ctr, "tag", "--force", name, pinned)
        if done.returncode != 0:
            pytest.fail(f"the image {image} can't be named {pinned}:\n{done.stderr}")
        return pinned


@contextmanager
def use_cluster(session: str, images: tuple[str, ...] = tuple(IMAGES)) -> Iterator[ClusterAccess]:
    """Yield the cluster of ``KUBECONFIG``, else kind's, else one that this test session starts; or skip.

    All processes that name the same session share one cluster; the last of them stops it.
    """
    found = find_running()
    if found is not None:
        yield ClusterAccess(found)
        return
    with _sharing(session, images) as access:
        yield access


def has_binaries() -> bool:
    """Return whether the binaries of the cluster have been built on this machine."""
    return _run(SCRIPTS / "build.sh", "--only-look").returncode == 0


def shared_folder() -> Path:
    """Return the folder with the clusters and locks of all test sessions of this machine."""
    folder = Path(tempfile.gettempdir()) / "mlp-k8s"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _run(*arguments: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def find_running() -> Path | None:
    """Return the kubeconfig of a cluster that runs without our doing."""
    named = os.environ.get("KUBECONFIG", "").split(os.pathsep)[0]
    if named and _answers(Path(named)):
        return Path(named)
    if shutil.which("kind") is None:
        return None
    names = _run("kind", "get", "clusters").stdout.split()
    if not names:
        return None
    kubeconfig = shared_folder() / f"kind-{names[0]}.kubeconfig"
    kubeconfig.write_text(_run("kind", "get", "kubeconfig", "--name", names[0]).stdout)
    if not _answers(kubeconfig):
        return None
    _run("kind", "load", "docker-image", "--name", names[0], *IMAGES, seconds=300)
    return kubeconfig


def _answers(kubeconfig: Path) -> bool:
    from kubernetes import client, config
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    try:
        with config.new_client_from_config(str(kubeconfig)) as api:
            client.CoreV1Api(api).list_namespace(limit=1, _request_timeout=5)
    except (ConfigException, HTTPError, client.ApiException, OSError):
        return False
    return True


@contextmanager
def _sharing(session: str, images: tuple[str, ...]) -> Iterator[ClusterAccess]:
    """Count this process among the users of the session's cluster, by a lock that the kernel takes back.

    Every user holds a shared lock on one file for as long as it lives. Whoever gets it exclusively is the last.
    The cluster looks at that lock too, and ends when nobody holds it: after a killed session only files remain,
    which the next session removes.
    """
    folder = shared_folder()
    state = folder / session
    users = folder / f"{session}.users"
    with FileLock(folder / "lock"):
        _clear_leftovers(folder)
        lock = users.open("w")
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            if not (state / "is-up").exists():
                _start(state, users, images)
        except BaseException:
            _leave(lock, users)
            raise
    try:
        number = (state / "number").read_text().strip()
        yield ClusterAccess(state / "kubeconfig", host_address=f"198.19.{number}.1", state=state)
    finally:
        with FileLock(folder / "lock"):
            _leave(lock, users)


def _leave(lock: TextIO, users: Path) -> None:
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _stop(users)


def clear_leftovers() -> None:
    """Remove what sessions that were killed have left."""
    with FileLock(shared_folder() / "lock"):
        _clear_leftovers(shared_folder())


def _clear_leftovers(folder: Path) -> None:
    for users in folder.glob("*.users"):
        with users.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _stop(users)


def _stop(users: Path) -> None:
    state = users.with_suffix("")
    if state.exists():
        done = _run(SCRIPTS / "stop.sh", state)
        if done.returncode != 0:
            pytest.fail(f"the cluster in {state} could not be stopped:\n{done.stderr}")
    users.unlink(missing_ok=True)


def _start(state: Path, users: Path, images: tuple[str, ...]) -> None:
    require_parts(images)
    if not has_binaries():
        done = _run(SCRIPTS / "build.sh", seconds=BUILD_SECONDS)
        if done.returncode != 0:
            pytest.fail(f"tests/cluster/build.sh failed:\n{done.stderr[-3000:]}")
    done = _run(SCRIPTS / "start.sh", "--while-locked", users, state, *images, seconds=200)
    if done.returncode != 0:
        pytest.fail(f"tests/cluster/start.sh failed:\n{done.stderr[-3000:]}")


def require_parts(images: tuple[str, ...]) -> None:
    """Skip unless this machine can start a cluster."""
    instead = "and neither KUBECONFIG nor kind leads to a running one"
    if sys.platform != "linux" or os.geteuid() != 0:
        missing(f"only root on Linux can start a Kubernetes cluster, {instead}")
    packages = [name for program, name in PROGRAMS.items() if shutil.which(program) is None]
    if packages:
        missing(f"a Kubernetes cluster needs the packages {' '.join(packages)}, {instead}")
    if not has_binaries() and shutil.which("go") is None:
        missing(f"no Go to build Kubernetes with (tests/cluster/build.sh), {instead}")
    if _run("unshare", "--net", "--mount", "--pid", "--fork", "true").returncode != 0:
        missing(f"no right to make the namespaces of a Kubernetes cluster, {instead}")
    require_docker()
    for image in images:
        if _run("docker", "image", "inspect", image).returncode != 0:
            missing(f"the Docker daemon has no image {image} ({IMAGES[image]} makes one)")
