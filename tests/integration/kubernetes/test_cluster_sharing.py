"""A test session's processes share one cluster, and nothing of it stays when they are gone."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.cluster.sharing import clear_leftovers, find_running, require_parts, shared_folder

pytestmark = pytest.mark.kubernetes

IMAGES = ("busybox:1.36",)
USE = """
import sys
from tests.cluster.sharing import use_cluster
with use_cluster(sys.argv[1], images=tuple(sys.argv[2:])) as access:
    print(access.kubeconfig, flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[3]


class User:
    """A process that uses the session's cluster until it is let go."""

    def __init__(self, session):
        self.process = subprocess.Popen(
            [sys.executable, "-c", USE, session, *IMAGES],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read_kubeconfig(self):
        return Path(self.process.stdout.readline().strip())

    def leave(self):
        self.process.communicate(timeout=60)

    def kill(self):
        self.process.kill()
        self.process.communicate()


def wait_until(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.1)


@pytest.fixture
def users():
    """Two processes that use the same cluster."""
    if find_running():
        pytest.skip("tests start no cluster of their own here: there is one")
    require_parts(IMAGES)
    session = f"shared-{uuid.uuid4().hex[:6]}"
    made = [User(session), User(session)]
    try:
        yield made
    finally:
        for user in made:
            user.kill()
        clear_leftovers()


def cable_of(state):
    number = (state / "number").read_text().strip()
    return Path(f"/sys/class/net/mlpk{number}")


def processes_of(state):
    """The command lines of this machine's processes that name the folder of the cluster."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"{state}/" in command or f"{state}\0" in command:
            found.append(command.replace("\0", " "))
    return found


def test_the_last_of_a_session_stops_the_cluster(users):
    first, second = users
    kubeconfig = first.read_kubeconfig()
    assert second.read_kubeconfig() == kubeconfig
    state = kubeconfig.parent
    cable = cable_of(state)

    first.leave()
    assert cable.exists()
    assert any("kubelet" in command for command in processes_of(state))

    second.leave()
    assert not state.exists()
    assert not cable.exists()
    assert processes_of(state) == []


def test_a_cluster_ends_when_its_session_is_killed(users):
    first, second = users
    state = first.read_kubeconfig().parent
    second.read_kubeconfig()
    cable = cable_of(state)

    for user in users:
        user.kill()

    wait_until(lambda: not cable.exists(), "the network of the cluster is gone")
    assert processes_of(state) == []
    clear_leftovers()
    assert list(shared_folder().glob(f"{state.name}*")) == []
