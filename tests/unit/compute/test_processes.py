from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.processes import (
    descendants,
    end_process,
    kill_marked,
    machine_identity,
    start_time,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP, env={**os.environ, "MARK": "it"})
    yield process
    process.kill()
    process.wait()


def test_a_start_time_tells_two_processes_apart() -> None:
    own = start_time(os.getpid())
    assert own == start_time(os.getpid())
    time.sleep(0.02)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        assert own != start_time(other.pid)
    assert start_time(other.pid) is None


def test_a_machine_is_recognised() -> None:
    assert machine_identity() == machine_identity()
    assert os.uname().nodename in machine_identity()


def test_descendants_are_found_at_any_depth() -> None:
    script = "sleep 60 & (sh -c 'sleep 61; true') & echo ready; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        deadline = time.monotonic() + 5
        while len(found := descendants(shell.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(found) >= 3
        assert os.getpid() not in found
        assert shell.pid in descendants(os.getpid())
        for pid in reversed(found):
            os.kill(pid, signal.SIGKILL)


def test_a_process_is_ended_by_its_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    assert started is not None
    assert end_process(sleeper.pid, started + 1, seconds=1)  # that one is gone already
    assert sleeper.poll() is None
    assert end_process(sleeper.pid, started, seconds=5)
    assert sleeper.wait() == -signal.SIGTERM


def test_a_process_that_does_not_end_is_reported() -> None:
    code = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = start_time(process.pid)
        assert started is not None
        assert not end_process(process.pid, started, seconds=0.1)
        process.kill()


def test_only_processes_with_the_mark_are_killed(sleeper: subprocess.Popen[bytes]) -> None:
    assert kill_marked("MARK", "other") == []
    assert kill_marked("MARK", "i") == []
    assert sleeper.poll() is None
    assert kill_marked("MARK", "it") == []
    assert sleeper.wait() == -signal.SIGKILL
