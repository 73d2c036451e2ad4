"""A container lives as long as its step run: not shorter than a worker, and no moment longer."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.definition.graph import DockerComputeSpec
from airflow_mlpipelines.exceptions import StepFailedError
from airflow_mlpipelines.runtime.log_lines import LONGEST_LINE
from tests.integration.docker.conftest import IMAGE, DockerStep, docker_cli, wait_until
from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.docker
SOCKET = "/var/run/docker.sock"
COUNT = """
import sys, time
for i in range(int(sys.argv[1])):
    print("line", i, flush=True)
    time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def kill_worker(step: DockerStep, after_line: str) -> None:
    """Kill the step's worker with SIGKILL once it has logged the line."""
    wait_until(lambda: after_line in step.worker_log, f"the worker logs {after_line!r}")
    worker = step.workers[-1]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()


def test_a_container_is_removed_after_success_and_after_failure(step: DockerStep) -> None:
    step.run(step.launch("true"))
    assert step.containers == []
    with pytest.raises(StepFailedError, match="exit code 3") as caught:
        step.run(step.launch("sh", "-c", "echo last words >&2; exit 3"))
    assert caught.value.exit_code == 3
    assert caught.value.log_tail == ("last words",)
    assert step.containers == []
    assert step.handle.get() is None


def test_a_retry_adopts_the_container_of_a_killed_worker_with_its_whole_log(
    step: DockerStep,
) -> None:
    launch = step.launch("python3", "-c", COUNT, "60", "0.03", "0")
    step.run_in_worker(launch)
    kill_worker(step, "line 10")
    (before,) = step.containers
    assert step.status == "running"

    retry = DockerLauncher(step.compute)
    assert retry.recover(step.name, step.handle)
    assert step.containers == [before]
    assert step.run(launch, retry) == [f"line {i}" for i in range(60)]
    assert step.containers == []


@pytest.mark.parametrize("code", [0, 7])
def test_the_end_of_a_container_that_nobody_read_counts(step: DockerStep, code: int) -> None:
    launch = step.launch("python3", "-c", COUNT, "10", "0.05", str(code))
    step.run_in_worker(launch)
    kill_worker(step, "line 2")
    wait_until(lambda: step.status == "exited", "the container has ended")

    retry = DockerLauncher(step.compute)
    assert retry.recover(step.name, step.handle)
    if code:
        with pytest.raises(StepFailedError) as caught:
            step.run(launch, retry)
        assert caught.value.exit_code == code
    else:
        step.run(launch, retry)
    assert step.lines == [f"line {i}" for i in range(10)]
    assert step.containers == []


def test_a_container_whose_end_was_read_is_not_taken_for_a_new_one(step: DockerStep) -> None:
    label = f"airflow-mlpipelines.step_run={step.name}"
    docker_cli("run", "--name", step.name, "--label", label, IMAGE, "false")
    (stale,) = step.containers
    launcher = DockerLauncher(step.compute)
    assert not launcher.recover(step.name, step.handle)
    assert step.containers == []
    assert step.run(step.launch("echo", "new"), launcher) == ["new"]
    assert stale not in step.containers


def test_a_container_that_was_never_started_is_replaced(step: DockerStep) -> None:
    label = f"airflow-mlpipelines.step_run={step.name}"
    docker_cli("create", "--name", step.name, "--label", label, IMAGE, "false")
    step.handle.set({"container": step.containers[0]})
    assert step.run(step.launch("echo", "new")) == ["new"]


def test_a_container_of_somebody_else_is_left_alone(step: DockerStep) -> None:
    foreign = docker_cli("create", "--name", step.name, IMAGE, "false")
    try:
        launcher = DockerLauncher(step.compute)
        assert not launcher.recover(step.name, step.handle)
        with pytest.raises(Exception, match="is taken"):
            step.run(step.launch("true"), launcher)
        assert step.inspect()["Id"] == foreign
    finally:
        docker_cli("rm", foreign)


def test_nothing_to_recover_is_no_error(step: DockerStep) -> None:
    assert not DockerLauncher(step.compute).recover(step.name, step.handle)


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    os._exit(0)
print("ready", flush=True)
while True:
    time.sleep(1)
"""


def test_a_kill_leaves_nothing_even_of_a_program_that_ignores_it(step: DockerStep) -> None:
    launcher, thread, ended = step.run_in_thread(step.python(STUBBORN))
    wait_until(lambda: "ready" in step.lines, "the program runs")
    pids = docker_cli("top", step.name, "-o", "pid").split()[1:]
    started = time.monotonic()
    launcher.kill()
    seconds = time.monotonic() - started
    alive = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    thread.join(10)
    assert len(pids) >= 3
    assert alive == []
    assert step.containers == []
    assert seconds < 4
    assert isinstance(ended[0], StepFailedError)
    assert "killed" in str(ended[0])


def test_a_program_that_listens_ends_by_itself_when_killed(step: DockerStep) -> None:
    program = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (open('/mlp/run/bye', 'w'), sys.exit()))\nprint('ready', flush=True)\ntime.sleep(60)"
    launcher, thread, _ = step.run_in_thread(step.python(program))
    wait_until(lambda: "ready" in step.lines, "the program runs")
    started = time.monotonic()
    launcher.kill()
    assert time.monotonic() - started < 2
    thread.join(10)
    assert (step.stage.run / "bye").exists()
    assert step.containers == []


def test_a_kill_in_a_signal_handler_of_the_running_thread_works(step: DockerStep) -> None:
    launch = step.launch("sh", "-c", "echo ready; sleep 60")

    def work() -> None:
        launcher = DockerLauncher(step.compute)
        signal.signal(signal.SIGTERM, lambda *_: launcher.kill())
        with (step.root / "worker.log").open("w", buffering=1) as file:
            try:
                launcher.run(launch, emit=lambda line: print(line, file=file), handle=step.handle)
            except StepFailedError as error:
                print(error, file=file)

    import multiprocessing

    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    step.workers.append(worker)
    wait_until(lambda: "ready" in step.worker_log, "the program runs")
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
    assert "it was killed" in step.worker_log
    assert step.containers == []


def test_a_kill_before_the_start_starts_nothing(step: DockerStep) -> None:
    launcher = DockerLauncher(step.compute)
    launcher.kill()
    with pytest.raises(StepFailedError, match="killed"):
        step.run(step.launch("touch", "/mlp/run/started"), launcher)
    assert not (step.stage.run / "started").exists()
    assert step.containers == []


def test_a_worker_believed_lost_does_not_kill_what_its_successor_adopted(step: DockerStep) -> None:
    launch = step.launch("python3", "-c", COUNT, "40", "0.05", "0")
    zombie, first, _ = step.run_in_thread(launch)
    wait_until(lambda: "line 3" in step.lines, "the first try logs")
    lines: list[str] = []
    errors: list[Exception] = []

    def take_over() -> None:
        try:
            DockerLauncher(step.compute).run(launch, emit=lines.append, handle=step.handle)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    second = threading.Thread(target=take_over, daemon=True)
    second.start()
    wait_until(lambda: "line 5" in lines, "the second try logs")
    zombie.kill()
    second.join(20)
    first.join(20)
    assert errors == []
    assert lines == [f"line {i}" for i in range(40)]
    assert step.containers == []


def test_a_step_is_ended_at_its_timeout(step: DockerStep) -> None:
    started = time.monotonic()
    with pytest.raises(StepFailedError, match=r"timeout of 0\.5 seconds") as caught:
        step.run(step.launch("sh", "-c", "echo began; sleep 60", timeout_seconds=0.5))
    assert time.monotonic() - started < 6
    assert caught.value.log_tail == ("began",)
    assert step.containers == []


def test_an_interrupt_in_the_middle_ends_the_container(step: DockerStep) -> None:
    class InterruptError(BaseException):
        pass

    def emit(line: str) -> None:
        raise InterruptError(line)

    with pytest.raises(InterruptError):
        DockerLauncher(step.compute).run(
            step.launch("sh", "-c", "echo ready; sleep 60"), emit=emit, handle=step.handle
        )
    assert step.containers == []
    assert step.handle.get() is None


def test_a_container_removed_by_somebody_is_an_error(step: DockerStep) -> None:
    _, thread, ended = step.run_in_thread(step.launch("sh", "-c", "echo ready; sleep 60"))
    wait_until(lambda: "ready" in step.lines, "the program runs")
    docker_cli("rm", "-f", step.name)
    thread.join(20)
    assert re.search("somebody removed its container|killed by SIGKILL", str(ended[0]))


def test_a_large_log_arrives_whole(step: DockerStep) -> None:
    program = "for i in range(100_000): print('line', i, '✓' * 10)"
    lines = step.run(step.python(program, env={"PYTHONIOENCODING": "utf-8"}))
    assert len(lines) == 100_000
    assert lines[-1] == f"line 99999 {'✓' * 10}"


def test_a_long_line_arrives_in_pieces_that_cut_no_character(step: DockerStep) -> None:
    lines = step.run(step.python("print('é' * 50_000)"))
    assert [len(line.encode()) for line in lines] == [LONGEST_LINE, 100_000 - LONGEST_LINE]
    assert "".join(lines) == "é" * 50_000


class FlakyDaemon:
    """The daemon behind a door that can be slammed on every connection."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.open = True
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if not self.open:
                    client.close()
                    continue
                daemon = socket.socket(socket.AF_UNIX)
                daemon.connect(SOCKET)
                self._sockets += [client, daemon]
                for pair in ((client, daemon), (daemon, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def slam(self) -> None:
        """Break every connection in the middle of whatever it carries."""
        sockets, self._sockets = self._sockets, []
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self._server.close()
        self.slam()


@pytest.fixture
def flaky() -> Iterator[FlakyDaemon]:
    if not os.path.exists(SOCKET):
        missing(f"no daemon on {SOCKET}")
    daemon = FlakyDaemon()
    yield daemon
    daemon.close()


def test_a_log_has_no_gap_and_no_repetition_across_broken_connections(
    step: DockerStep, flaky: FlakyDaemon
) -> None:
    step.compute = DockerComputeSpec(name="d", image=IMAGE, docker_url=flaky.url)
    _, thread, ended = step.run_in_thread(step.launch("python3", "-c", COUNT, "2000", "0.001", "0"))
    wait_until(lambda: step.lines, "the program logs")
    cuts = 0
    while thread.is_alive():
        time.sleep(0.25)
        flaky.slam()
        cuts += 1
    assert ended == [None]
    assert cuts > 3
    assert step.lines == [f"line {i}" for i in range(2000)]


def test_a_daemon_that_is_away_for_a_while_is_waited_for(
    step: DockerStep, flaky: FlakyDaemon
) -> None:
    step.compute = DockerComputeSpec(name="d", image=IMAGE, docker_url=flaky.url)
    _, thread, ended = step.run_in_thread(step.launch("python3", "-c", COUNT, "20", "0.05", "0"))
    wait_until(lambda: "line 3" in step.lines, "the program logs")
    flaky.open = False
    flaky.slam()
    wait_until(lambda: step.status == "exited", "the container has ended while nobody looked")
    flaky.open = True
    thread.join(20)
    assert ended == [None]
    assert step.lines == [f"line {i}" for i in range(20)]
    assert step.containers == []
