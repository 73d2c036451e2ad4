"""Steps that share the declared GPUs of a machine, each of them a worker process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute import local as local_module
from airflow_mlpipelines.compute.local import STEP_RUN_VARIABLE, LocalLauncher
from airflow_mlpipelines.compute.processes import kill_marked
from airflow_mlpipelines.definition.graph import LocalComputeSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from tests.unit.compute.launcher_contract import Workbench, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

PRINTS_ITS_GPUS = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
# For as long as it runs, a file says so for each of its GPUs; two at once would find it there.
USES_ITS_GPUS = """
    import os, sys, time
    for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
        os.mkdir(sys.argv[1] + "/gpu-" + gpu)
    with open(sys.argv[1] + "/order", "a") as file:
        file.write(sys.argv[2] + " " + os.environ["CUDA_VISIBLE_DEVICES"] + "\\n")
    time.sleep(float(sys.argv[3]))
    for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
        os.rmdir(sys.argv[1] + "/gpu-" + gpu)
    """
BEATS = "import beat; beat.beat('program')"
GPUS = ("GPU-a", "GPU-b")


class Machine:
    """A machine with declared GPUs, and workers on it that can be killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shared = root / "shared"
        self.shared.mkdir()
        self.workers: dict[str, BaseProcess] = {}
        self.benches: list[Workbench] = []

    def bench(self, name: str, gpus: int | tuple[str, ...] | None = GPUS) -> Workbench:
        compute = LocalComputeSpec(name="local", gpus=gpus)
        root = self.root / name
        root.mkdir()
        made = Workbench(
            root,
            lambda: LocalLauncher(compute),
            None,
            f"mlp-{os.getpid()}-{root.parent.name}-{name}",
        )
        self.benches.append(made)
        return made

    def start(
        self, name: str, count: int, script: str, *arguments: str, gpus: tuple[str, ...] = GPUS
    ) -> BaseProcess:
        """Run a step in a worker of its own; what it says is in :meth:`log`."""
        bench = self.bench(name, gpus)
        log = bench.root / "log"
        log.touch()

        def say(line: str) -> None:
            with log.open("a", buffering=1) as file:
                print(line, file=file)

        def work() -> None:
            bench.on_line = say
            bench.run(script, *arguments, resources=ResourcesSpec(gpus=count))

        worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        worker.start()
        self.workers[name] = worker
        return worker

    def run(self, bench: Workbench, script: str, count: int | None, **options: Any) -> list[str]:
        """Run a step here, and return what it says; a step that waits for ever fails the test."""
        bench.start(script, resources=ResourcesSpec(gpus=count), **options).wait()
        return bench.lines

    def log(self, name: str) -> str:
        return (self.root / name / "log").read_text()

    def is_waiting(self, name: str) -> Callable[[], bool]:
        return lambda: "Waiting for" in self.log(name)

    def clean(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.join()
        for bench in self.benches:
            bench.launcher.kill()
            kill_marked(STEP_RUN_VARIABLE, bench.step_run_id)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("MLPIPELINES_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local_module, "machine_gpus", list)  # a real GPU here would not be these
    made = Machine(tmp_path)
    try:
        yield made
    finally:
        made.clean()


# ---- who gets what -----------------------------------------------------------------------------


def test_six_steps_on_two_gpus_never_share_one(machine: Machine) -> None:
    asked = {"s0": 1, "s1": 2, "s2": 1, "s3": 1, "s4": 2, "s5": 1}
    for name, count in asked.items():
        machine.start(name, count, USES_ITS_GPUS, str(machine.shared), name, "0.2")
    for worker in machine.workers.values():
        worker.join(60)
    assert [worker.exitcode for worker in machine.workers.values()] == [0] * 6
    lines = (machine.shared / "order").read_text().split("\n")[:-1]
    got = {name: gpus.split(",") for name, gpus in (line.split(" ") for line in lines)}
    assert {name: len(gpus) for name, gpus in got.items()} == asked
    assert {gpu for gpus in got.values() for gpu in gpus} == set(GPUS)


def test_a_step_that_needs_several_is_not_passed_by(machine: Machine) -> None:
    machine.start("long", 1, USES_ITS_GPUS, str(machine.shared), "long", "2")
    wait_until((machine.shared / "order").exists)
    for name, count in (("both", 2), ("third", 1), ("fourth", 1)):
        machine.start(name, count, USES_ITS_GPUS, str(machine.shared), name, "0")
        wait_until(machine.is_waiting(name))
    assert "after step" in machine.log("third")
    for worker in machine.workers.values():
        worker.join(30)
    order = [line.split(" ")[0] for line in (machine.shared / "order").read_text().splitlines()]
    assert order[:2] == ["long", "both"]
    assert sorted(order[2:]) == ["fourth", "third"]


def test_steps_on_other_gpus_do_not_wait(machine: Machine) -> None:
    machine.start("here", 2, BEATS)
    wait_until((machine.root / "here/stage/run/beat-program").exists)
    machine.start("queued", 1, BEATS)
    wait_until(machine.is_waiting("queued"))
    there = machine.bench("there", ("GPU-c",))
    machine.run(there, PRINTS_ITS_GPUS, 1)
    assert there.lines == ["GPU-c"]


def test_who_holds_the_gpus_is_said(machine: Machine) -> None:
    holder = machine.start("holder", 2, BEATS)
    wait_until((machine.root / "holder/stage/run/beat-program").exists)
    machine.start("waiter", 1, PRINTS_ITS_GPUS)
    wait_until(machine.is_waiting("waiter"))
    said = machine.log("waiter")
    assert "Waiting for 1 of the 2 GPUs of this compute: GPU GPU-a is held by step" in said
    assert f"-holder, process {holder.pid})" in said


def test_gpus_are_free_as_soon_as_a_step_has_ended(machine: Machine) -> None:
    bench = machine.bench("one")
    for _ in range(5):
        machine.run(bench, PRINTS_ITS_GPUS, 2)
    assert bench.lines == ["GPU-a,GPU-b"] * 5  # and no word of waiting


# ---- crashes -----------------------------------------------------------------------------------


def test_a_killed_worker_keeps_its_gpu_until_its_program_is_gone(machine: Machine) -> None:
    # The program ignores SIGTERM, so it lives two seconds longer than its worker.
    worker = machine.start(
        "lost",
        2,
        """
        import signal, beat
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        beat.beat("program")
        """,
    )
    beat = machine.root / "lost/stage/run/beat-program"
    wait_until(beat.exists)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    next_one = machine.bench("next")
    seen: list[str] = []
    next_one.on_line = lambda line: (
        seen.append(beat.read_text()) if line.startswith("GPU-") else None
    )
    machine.run(next_one, PRINTS_ITS_GPUS, 1)
    assert "is held by step" in next_one.lines[0]
    assert next_one.lines[-1] == "GPU-a"
    time.sleep(0.2)
    assert seen == [beat.read_text()]  # it was over when the next one began


def test_a_gpu_is_held_while_the_program_outlives_worker_and_guardian(machine: Machine) -> None:
    worker = machine.start("lost", 2, BEATS)
    beat = machine.root / "lost/stage/run/beat-program"
    wait_until(beat.exists)
    lost = machine.benches[0]
    noted = lost.handle.get()
    assert noted is not None
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)  # so that it does not clean up after its guardian
    os.kill(int(noted["guardian"]), signal.SIGKILL)
    os.kill(worker.pid, signal.SIGKILL)
    machine.start("next", 1, PRINTS_ITS_GPUS)
    wait_until(machine.is_waiting("next"))
    before = beat.read_text()
    wait_until(lambda: beat.read_text() != before)
    assert "GPU-a\n" not in machine.log("next")
    lost.next_try()
    lost.launcher.recover(lost.step_run_id, lost.handle)  # as the next try does
    machine.workers["next"].join(10)
    assert machine.log("next").endswith("GPU-a\n")


def test_a_step_that_is_killed_while_it_waits_leaves_the_queue(machine: Machine) -> None:
    machine.start("holder", 2, USES_ITS_GPUS, str(machine.shared), "holder", "2")
    wait_until((machine.shared / "order").exists)
    machine.start("killed", 2, BEATS)
    wait_until(machine.is_waiting("killed"))
    machine.workers["killed"].kill()
    machine.workers["killed"].join(10)  # its place in the queue is free once it is dead
    last = machine.bench("last")
    machine.run(last, PRINTS_ITS_GPUS, 2)
    assert "holder" in last.lines[0]
    assert last.lines[-1] == "GPU-a,GPU-b"


def test_kill_ends_the_waiting_and_starts_nothing(machine: Machine) -> None:
    machine.start("holder", 1, BEATS)
    wait_until((machine.root / "holder/stage/run/beat-program").exists)
    bench = machine.bench("waiter")
    running = bench.start("print('ran')", resources=ResourcesSpec(gpus=2))
    wait_until(lambda: bool(bench.lines))
    started = time.monotonic()
    bench.launcher.kill()
    assert time.monotonic() - started < 1.5
    with pytest.raises(StepFailedError, match="killed while it waited for GPUs"):
        running.wait()
    assert "ran" not in bench.lines
    assert not list((machine.root / "locks/queue").iterdir())


def test_waiting_does_not_count_as_time_of_the_program(machine: Machine) -> None:
    machine.start("holder", 2, USES_ITS_GPUS, str(machine.shared), "holder", "2")
    wait_until((machine.shared / "order").exists)
    bench = machine.bench("waiter")
    machine.run(bench, PRINTS_ITS_GPUS, 1, timeout_seconds=1)
    assert bench.lines[-1] == "GPU-a"


# ---- what a step sees --------------------------------------------------------------------------


def test_a_step_that_asks_for_none_sees_none_where_gpus_are_declared(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    bench = machine.bench("declared")
    bench.run(PRINTS_ITS_GPUS)
    assert bench.lines == [""]
    undeclared = machine.bench("undeclared", None)
    undeclared.run(PRINTS_ITS_GPUS)
    assert undeclared.lines == ["GPU-a"]


@pytest.mark.parametrize("framework", ["pytorch", "tensorflow"])
def test_each_node_of_a_gang_sees_gpus_of_its_own(machine: Machine, framework: str) -> None:
    gpus = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
    bench = machine.bench("gang", gpus)
    bench.write("work.py", PRINTS_ITS_GPUS)
    spec = {
        "framework": framework,
        "nodes": 2,
        "processes_per_node": 2,
        "parameter_servers": 0,
    }
    gang = [sys.executable, "-m", "airflow_mlpipelines.runtime.gang", json.dumps(spec)]
    argv = [*gang, "--", sys.executable, "work.py"]
    bench.start(argv=argv, nodes=2, resources=ResourcesSpec(gpus=2)).wait()

    assert sorted(bench.lines) == [
        "[rank 0] GPU-a,GPU-b",
        "[rank 1] GPU-a,GPU-b",
        "[rank 2] GPU-c,GPU-d",
        "[rank 3] GPU-c,GPU-d",
    ]
    with pytest.raises(ComputeUnavailableError, match=r"asks for 4 GPUs.* can hand out 2"):
        machine.bench("too few").launcher.check_resources("train", ResourcesSpec(gpus=2), nodes=2)


def test_more_gpus_than_there_are_is_said_and_not_waited_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ComputeUnavailableError, match=r"asks for 1 GPUs.* can hand out 0"):
        machine.bench("none", None).run(PRINTS_ITS_GPUS, resources=ResourcesSpec(gpus=1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    with pytest.raises(ComputeUnavailableError, match="CUDA_VISIBLE_DEVICES='GPU-b'"):
        machine.bench("limited").run(PRINTS_ITS_GPUS, resources=ResourcesSpec(gpus=2))


def test_a_directory_that_can_not_be_made_is_named_with_the_way_out(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPELINES_GPU_LOCKS", "/proc/nowhere")
    with pytest.raises(ComputeUnavailableError, match="MLPIPELINES_GPU_LOCKS"):
        machine.bench("one").run(PRINTS_ITS_GPUS, resources=ResourcesSpec(gpus=1))
