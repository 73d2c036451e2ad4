from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.local import LocalLauncher
from airflow_mlpipelines.compute.processes import machine_identity, start_time
from airflow_mlpipelines.definition.graph import LocalComputeSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import StepFailedError
from tests.unit.compute.launcher_contract import LauncherContract, Workbench, wait_until
from tests.unit.compute.step_contract import StepContract

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.compute.base import Launcher

DUMP_ENVIRONMENT = """
    import json, os
    json.dump(dict(os.environ), open(os.environ["MLP_RUN_DIR"] + "/env", "w"))
    """
STOPS_A_WHILE = "print('go')\nimport beat; beat.beat('program')"


class TestLocalLauncher(LauncherContract, StepContract):
    # A process has its worker's rights: what it may change has to be its own.
    input_mode = "download"
    inputs_are_read_only = False

    def make_launcher(self) -> Launcher:
        return LocalLauncher(LocalComputeSpec(name="local"))

    def home_variables(self, bench: Workbench) -> Mapping[str, str]:
        home = bench.root / "home"
        home.mkdir()
        return {"HOME": str(home)}


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(
        tmp_path,
        lambda: LocalLauncher(LocalComputeSpec(name="local")),
        None,
        f"mlp-local-{os.getpid()}-{tmp_path.name}",
    )


# ---- when the worker, or the guardian, is killed -------------------------------------------------


def test_nothing_outlives_a_worker_that_is_killed_with_sigkill(bench: Workbench) -> None:
    bench.run_in_lost_worker(bench.path("beat-program").exists, None, "wait", name="brood.py")
    wait_until(bench.is_quiet, seconds=5)


def test_nothing_outlives_a_guardian_that_is_killed_with_sigkill(bench: Workbench) -> None:
    running = bench.start(STOPS_A_WHILE)
    wait_until(bench.path("beat-program").exists)
    os.kill(_guardian(bench), signal.SIGKILL)
    with pytest.raises(StepFailedError, match="its guardian was killed"):
        running.wait()
    assert bench.is_quiet()


def test_a_signal_to_the_guardian_ends_the_program(bench: Workbench) -> None:
    running = bench.start(STOPS_A_WHILE)
    wait_until(bench.path("beat-program").exists)
    os.kill(_guardian(bench), signal.SIGTERM)
    with pytest.raises(StepFailedError, match="somebody has sent a signal"):
        running.wait()
    assert bench.is_quiet()


def test_the_guardian_keeps_no_file_of_the_worker_open(bench: Workbench) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mine = {Path(f"/proc/self/fd/{item.fileno()}").readlink() for item in (ours, theirs)}
        running = bench.start(STOPS_A_WHILE)
        wait_until(bench.path("beat-program").exists)
        files = Path(f"/proc/{_guardian(bench)}/fd")
        held = {file.readlink() for file in files.iterdir()}
        bench.launcher.kill()
    with pytest.raises(StepFailedError):
        running.wait()
    assert not held & mine
    assert len(held) <= 6


def test_a_kill_from_a_signal_handler_does_not_wait_for_itself(bench: Workbench) -> None:
    # As Airflow does it: the handler of SIGTERM calls on_kill in the thread that runs the step.
    def handle(*_: object) -> None:
        bench.launcher.kill()

    before = signal.signal(signal.SIGUSR1, handle)
    bench.on_line = lambda line: signal.raise_signal(signal.SIGUSR1) if line == "go" else None
    try:
        with pytest.raises(StepFailedError, match="killed"):
            bench.run(
                """
                import signal, sys
                def end(*_):
                    print("x" * 300000)
                    print("the end")
                    sys.exit()
                signal.signal(signal.SIGTERM, end)
                print("go")
                import beat; beat.beat("program")
                """
            )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert bench.lines[-1] == "the end"


# ---- what an earlier try has left ---------------------------------------------------------------


def test_a_process_that_got_the_id_of_an_earlier_guardian_is_left_alone(bench: Workbench) -> None:
    bystander = os.fork()
    if bystander == 0:
        signal.pause()
    started = start_time(bystander)
    assert started is not None
    bench.handle.set(
        {
            "launcher": "local",
            "machine": machine_identity(),
            "guardian": bystander,
            "started": started - 1,
        }
    )
    assert bench.launcher.recover(bench.step_run_id, bench.handle) is False
    assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    assert bench.handle.get() is None
    os.kill(bystander, signal.SIGKILL)
    os.waitpid(bystander, 0)


def test_what_is_noted_of_another_machine_means_no_process_of_this_one(bench: Workbench) -> None:
    bystander = os.fork()
    if bystander == 0:
        signal.pause()
    noted = {"launcher": "local", "guardian": bystander, "started": start_time(bystander)}
    bench.handle.set({**noted, "machine": "another"})
    assert bench.launcher.recover(bench.step_run_id, bench.handle) is False
    assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    os.kill(bystander, signal.SIGKILL)
    os.waitpid(bystander, 0)


def test_an_earlier_worker_that_was_believed_to_be_lost_loses_its_program(bench: Workbench) -> None:
    earlier = bench.launcher
    running = bench.start(STOPS_A_WHILE)
    wait_until(bench.path("beat-program").exists)
    bench.next_try()
    assert bench.launcher is not earlier
    assert bench.launcher.recover(bench.step_run_id, bench.handle) is False
    assert bench.is_quiet()
    with pytest.raises(StepFailedError, match="a later try has begun"):
        running.wait()


# ---- its surroundings ---------------------------------------------------------------------------


def test_what_configures_the_worker_does_not_reach_the_program(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_STORE", "s3://key:secret@")
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "secret")
    monkeypatch.setenv("SOME_PROXY", "http://proxy")
    monkeypatch.setenv("AIRFLOW_CTX_DAG_ID", "flights")
    bench.run(DUMP_ENVIRONMENT)
    seen = bench.read("env")
    assert (seen["SOME_PROXY"], seen["AIRFLOW_CTX_DAG_ID"]) == ("http://proxy", "flights")
    assert [name for name in seen if re.match("AIRFLOW_(?!CTX_)", name)] == ["AIRFLOW_HOME"]


def test_python_means_the_interpreter_of_the_environment(bench: Workbench) -> None:
    bench.run(argv=["python", "-c", "import sys; print(sys.executable)"])
    assert bench.lines == [sys.executable]


def test_the_interpreter_keeps_the_paths_that_it_has_in_the_worker(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    bench.run(DUMP_ENVIRONMENT)
    assert bench.read("env")["PYTHONPATH"] == f"{bench.paths.runtime}:/some/where"


def test_signals_mean_to_the_program_what_they_mean_to_any(bench: Workbench) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        bench.run(
            """
            import signal
            numbers = ["SIGTERM", "SIGCHLD", "SIGHUP", "SIGUSR1", "SIGPIPE", "SIGALRM"]
            print([n for n in numbers if signal.getsignal(getattr(signal, n)) == signal.SIG_IGN])
            print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
            """
        )
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    assert bench.lines == ["['SIGPIPE']", "[]"]  # which Python itself ignores


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["kill -9 $$", "exit 137"])
def test_a_program_that_the_kernel_killed_is_told_apart(bench: Workbench, code: str) -> None:
    with pytest.raises(StepFailedError, match="ran out of memory"):
        bench.run(argv=["sh", "-c", code])


def test_a_signal_is_named(bench: Workbench) -> None:
    with pytest.raises(StepFailedError, match="SIGSEGV") as failure:
        bench.run(argv=["sh", "-c", "kill -SEGV $$"])
    assert failure.value.exit_code == -signal.SIGSEGV


def test_limits_that_are_asked_for_are_said_not_to_be_enforced(
    bench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench.run("pass")
    assert "not enforced" not in caplog.text
    bench.run("pass", resources=ResourcesSpec(cpus=2, memory=1 << 30))
    assert "not enforced: cpus=2.0, memory=1073741824" in caplog.text


def test_an_argument_that_no_process_can_have_is_a_failure_in_words(bench: Workbench) -> None:
    with pytest.raises(StepFailedError, match="null byte") as failure:
        bench.run("pass", "a\0b")
    assert not failure.value.retryable


def test_a_fork_beside_threads_warns_of_nothing(
    bench: Workbench, recwarn: pytest.WarningsRecorder
) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    bench.run("pass")
    over.set()
    thread.join()
    assert not recwarn.list


def _guardian(bench: Workbench) -> int:
    noted = bench.handle.get()
    assert noted is not None
    return int(noted["guardian"])
