"""Several processes that work as one step, as real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from airflow_mlpipelines.runtime.stage import stage_runtime
from tests.parts import missing, require_python

PYTORCH = {"framework": "pytorch", "nodes": 2, "processes_per_node": 2, "parameter_servers": 0}
# What init_process_group() does with these variables, without PyTorch: all ranks meet at rank 0.
ALL_REDUCE = """
    import os, socket, time
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.create_server(place) as server:
            others = [server.accept()[0] for _ in range(size - 1)]
            total = sum(int(other.makefile().readline()) for other in others)
        print("total", total)
    else:
        while True:
            try:
                with socket.create_connection(place) as connection:
                    connection.sendall(b"%d\\n" % rank)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    print("rank", rank, "local", os.environ["LOCAL_RANK"], "node", os.environ["NODE_RANK"])
    """
MPI_REDUCE = """
    from mpi4py import MPI
    world = MPI.COMM_WORLD
    total = world.allreduce(world.Get_rank() + 1)
    print("total", total, "of", world.Get_size(), flush=True)
    """


@pytest.fixture(params=[pytest.param("3.8", marks=pytest.mark.python38), "own"])
def python(request: pytest.FixtureRequest) -> str:
    return sys.executable if request.param == "own" else str(require_python(request.param))


def start(
    root: Path, spec: dict, script: str, *, python: str = sys.executable, program: str | None = None
):
    """Start a gang as a step does: with the staged runtime package, in a folder of its own."""
    code = root / "code"
    code.mkdir()
    (code / "work.py").write_text(textwrap.dedent(script))
    command = [program or python, "work.py"]
    return subprocess.Popen(
        [python, "-m", "airflow_mlpipelines.runtime.gang", json.dumps(spec), "--", *command],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(stage_runtime(root / "runtime")),
            "PYTHONUNBUFFERED": "1",
        },
        cwd=code,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(gang) -> tuple[int, list[str]]:
    output, _ = gang.communicate(timeout=60)
    return gang.returncode, output.splitlines()


def test_ranks_find_each_other_by_pytorch_s_variables(tmp_path: Path, python: str):
    code, lines = finish(start(tmp_path, PYTORCH, ALL_REDUCE, python=python))

    assert code == 0, lines
    assert "[rank 0] total 6" in lines
    assert {line for line in lines if "local" in line} == {
        "[rank 0] rank 0 local 0 node 0",
        "[rank 1] rank 1 local 1 node 0",
        "[rank 2] rank 2 local 0 node 1",
        "[rank 3] rank 3 local 1 node 1",
    }
    kept = (tmp_path / "code" / "logs" / "std_log_process_3.txt").read_text()
    assert kept == "rank 3 local 1 node 1\n"


def test_tensorflow_s_processes_are_told_of_the_cluster_and_their_place_in_it(tmp_path: Path):
    spec = {
        "framework": "tensorflow",
        "nodes": 1,
        "processes_per_node": 2,
        "parameter_servers": 1,
    }
    code, lines = finish(start(tmp_path, spec, "import os; print(os.environ['TF_CONFIG'])"))

    assert code == 0
    configs = [json.loads(line.split(" ", 2)[2]) for line in sorted(lines)]
    assert [config["task"] for config in configs] == [
        {"type": "worker", "index": 0},
        {"type": "worker", "index": 1},
        {"type": "ps", "index": 0},
    ]
    cluster = configs[0]["cluster"]
    assert all(config["cluster"] == cluster for config in configs)
    assert len({*cluster["worker"], *cluster["ps"]}) == 3


def test_one_rank_dies_and_the_gang_ends_with_its_log_and_its_exit_code(tmp_path: Path):
    script = """
        import os, sys, time
        if os.environ["RANK"] == "2":
            sys.exit("out of data")
        time.sleep(600)
        """
    started = time.monotonic()
    gang = start(tmp_path, PYTORCH, script)
    code, lines = finish(gang)

    assert code == 1
    assert lines[-2:] == [
        "rank 2 of 4 ended with exit code 1; the other 3 were ended. The end of its log:",
        "  out of data",
    ]
    assert time.monotonic() - started < 30


def test_a_rank_that_a_signal_ended_has_a_shell_s_exit_code(tmp_path: Path):
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code, lines = finish(start(tmp_path, {**PYTORCH, "nodes": 1, "processes_per_node": 1}, script))

    assert code == 128 + signal.SIGKILL
    assert lines[0].startswith("rank 0 of 1 ended with exit code 137. ")


def test_a_gang_that_is_asked_to_end_leaves_no_process(tmp_path: Path):
    script = """
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("started", flush=True)
        import time; time.sleep(600)
        """
    gang = start(tmp_path, PYTORCH, script)
    assert gang.stdout is not None
    for _ in range(4):
        assert "started" in gang.stdout.readline()
    children = psutil.Process(gang.pid).children(recursive=True)
    assert len(children) == 8

    gang.terminate()
    code, _ = finish(gang)

    assert code == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_a_program_that_is_not_there_is_named(tmp_path: Path):
    code, lines = finish(start(tmp_path, PYTORCH, "", program="no-such-program"))

    assert (code, lines) == (
        127,
        ["'no-such-program' could not be started: No such file or directory"],
    )


def test_real_mpi_processes_reduce(tmp_path: Path):
    python = "/usr/bin/python3"  # mpi4py comes with the distribution's interpreter
    if shutil.which("mpirun") is None or not Path(python).exists():
        missing("no mpirun")
    if subprocess.run([python, "-c", "import mpi4py"], capture_output=True).returncode != 0:
        missing("no mpi4py for the distribution's Python")
    spec = {"framework": "mpi", "nodes": 1, "processes_per_node": 3, "parameter_servers": 0}

    code, lines = finish(start(tmp_path, spec, MPI_REDUCE, program=python))

    assert code == 0, lines
    assert {f"[rank {rank}] total 6 of 3" for rank in range(3)} <= set(lines)


def test_an_mpi_rank_that_fails_ends_the_others(tmp_path: Path):
    if shutil.which("mpirun") is None:
        missing("no mpirun")
    script = """
        import os, sys, time
        if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
            sys.exit(3)
        time.sleep(600)
        """
    spec = {"framework": "mpi", "nodes": 1, "processes_per_node": 2, "parameter_servers": 0}

    code, _ = finish(start(tmp_path, spec, script))

    assert code == 3


def test_without_mpirun_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = {"framework": "mpi", "nodes": 1, "processes_per_node": 2, "parameter_servers": 0}
    monkeypatch.setenv("PATH", str(tmp_path))

    code, lines = finish(start(tmp_path, spec, ""))

    assert code == 127
    assert "install an MPI" in lines[0]
