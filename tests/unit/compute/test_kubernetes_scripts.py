"""The shell programs of a pod's helpers, run here as a pod would run them."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import tarfile
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.kubernetes.scripts import RECEIVE, SHELL, WAIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORD = "word"
SECONDS = 20.0


def make_archive() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        info = tarfile.TarInfo("code/train.py")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"pass"))
    return made.getvalue()


def receive(workspace: Path, archive: bytes) -> int:
    """Hand an archive over as a worker does, and return how that ended."""
    command = [SHELL, "-c", RECEIVE, SHELL, str(len(archive)), WORD]
    with subprocess.Popen(
        command, cwd=workspace, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as receiving:
        assert receiving.stdin is not None
        assert receiving.stdout is not None
        receiving.stdin.write(archive)
        receiving.stdin.flush()
        assert receiving.stdout.readline().decode().strip() == hashlib.sha256(archive).hexdigest()
        receiving.stdin.write(f"{WORD}\n".encode())
        receiving.stdin.close()
        return receiving.wait(SECONDS)


@contextmanager
def waiting(workspace: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the container ``stage``, and end all that it has started."""
    stage = subprocess.Popen(
        [SHELL, "-c", WAIT], cwd=workspace, env={**os.environ, **env}, start_new_session=True
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not (workspace / "control" / "wake").exists():
            assert stage.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield stage
    finally:
        with suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGKILL)
        stage.wait()


def test_a_step_begins_as_soon_as_its_files_are_there(tmp_path: Path):
    with waiting(tmp_path) as stage:
        time.sleep(0.3)
        assert stage.poll() is None
        assert receive(tmp_path, make_archive()) == 0
        assert (
            stage.wait(5) == 0
        )  # not when it next looks for whether there is a worker still, in a minute
    assert (tmp_path / "code" / "train.py").read_text() == "pass"


def test_a_step_whose_files_came_before_its_pod_looked_begins(tmp_path: Path):
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "staged").touch()
    with waiting(tmp_path) as stage:
        assert stage.wait(5) == 0


def test_a_pod_that_waits_for_its_files_starts_no_processes(tmp_path: Path):
    # A hundred of them would take the node's processors from those that run.
    tools, told = tmp_path / "tools", tmp_path / "told"
    tools.mkdir()
    for name in ("sleep", "find", "head"):
        (tools / name).write_text(
            f'#!/bin/sh\necho {name} >> {told}\nPATH="${{PATH#*:}}" exec {name} "$@"\n'
        )
        (tools / name).chmod(0o755)
    with waiting(tmp_path, PATH=f"{tools}:{os.environ['PATH']}") as stage:
        time.sleep(1.5)
        assert stage.poll() is None
        assert sorted(told.read_text().split()) == ["find", "head", "sleep"]


def test_a_pod_that_waits_for_its_files_ends_when_it_is_told_to(tmp_path: Path):
    with waiting(tmp_path) as stage:
        time.sleep(0.3)
        stage.send_signal(signal.SIGTERM)
        assert stage.wait(5) == 1
