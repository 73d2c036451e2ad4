"""Several processes that work as one step, as real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from airflow_mlpipelines.runtime.connection import Connection, LostError
from airflow_mlpipelines.runtime.rendezvous import Ports
from airflow_mlpipelines.runtime.stage import stage_runtime
from tests.gangs import free_ports
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
    root: Path,
    spec: dict,
    script: str,
    *,
    python: str = sys.executable,
    program: str | None = None,
    arguments: list[str] | None = None,
    env: dict[str, str] | None = None,
):
    """Start a gang as a step does: with the staged runtime package, in a folder of its own."""
    code = root / "code"
    code.mkdir(parents=True, exist_ok=True)
    (code / "work.py").write_text(textwrap.dedent(script))
    command = [program or python, "work.py", *(arguments or [])]
    return subprocess.Popen(
        [python, "-m", "airflow_mlpipelines.runtime.gang", json.dumps(spec), "--", *command],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(stage_runtime(root / "runtime")),
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
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


def test_a_progress_bar_shows_while_it_lasts_and_output_without_line_ends_comes_in_pieces(
    tmp_path: Path, python: str
):
    script = """
        import sys, time
        for percent in range(120):
            print("\\r%d%%" % percent, end="", flush=True)
            time.sleep(0.1)
        print("\\rdone")
        sys.stdout.write("x" * 200000)
        sys.stdout.flush()
        time.sleep(600)
        """
    gang = start(tmp_path, {**PYTORCH, "nodes": 1, "processes_per_node": 1}, script, python=python)
    assert gang.stdout is not None
    first, last, piece = (gang.stdout.readline() for _ in range(3))
    gang.terminate()
    finish(gang)

    assert re.fullmatch(r"\[rank 0\] \d+%\n", first)
    assert last == "[rank 0] done\n"
    assert piece == f"[rank 0] {'x' * (64 << 10)}\n"
    kept = (tmp_path / "code" / "logs" / "std_log_process_0.txt").read_bytes()
    assert kept.startswith(b"\r0%\r1%")
    assert b"\rdone\nxxx" in kept


def test_a_rank_whose_log_can_t_be_kept_runs_on_and_it_is_said(tmp_path: Path, python: str):
    script = """
        for i in range(20000):
            print("line", i)
        """
    spec = {**PYTORCH, "nodes": 1, "processes_per_node": 1}
    (tmp_path / "code" / "logs" / "std_log_process_0.txt").mkdir(parents=True)
    code, lines = finish(start(tmp_path, spec, script, python=python))

    assert code == 0
    assert lines[0] == "logs/std_log_process_0.txt can't be written: Is a directory"
    assert lines[1:] == [f"[rank 0] line {i}" for i in range(20000)]


# As TensorFlow's server.join() does, what serves never returns.
SERVES = """
    import json, os, sys, time
    kind = json.loads(os.environ["TF_CONFIG"])["task"]["type"]
    print("begun as", kind, flush=True)
    if kind in sys.argv[1:]:
        time.sleep(600)
    time.sleep(1)
    """


@pytest.mark.parametrize(
    ("chief", "serving", "tasks"),
    [
        (False, ["ps"], ["worker 0", "worker 1", "ps 0"]),
        (True, ["ps", "worker"], ["chief 0", "worker 0", "worker 1", "ps 0"]),
    ],
)
def test_a_cluster_is_done_with_its_workers_or_its_chief_though_others_serve_for_ever(
    tmp_path: Path, python: str, chief: bool, serving: list[str], tasks: list[str]
):
    spec = {
        "framework": "tensorflow",
        "nodes": 1,
        "processes_per_node": 2,
        "parameter_servers": 1,
        "chief": chief,
    }
    gang = start(tmp_path, spec, SERVES, python=python, arguments=serving)
    code, lines = finish(gang)

    assert code == 0, lines
    assert sorted(lines) == [
        f"[rank {rank}] begun as {task.split()[0]}" for rank, task in enumerate(tasks)
    ]


def test_a_server_that_fails_ends_its_cluster(tmp_path: Path):
    script = """
        import json, os, sys, time
        if json.loads(os.environ["TF_CONFIG"])["task"]["type"] == "ps":
            sys.exit(5)
        time.sleep(600)
        """
    spec = {"framework": "tensorflow", "nodes": 1, "processes_per_node": 2, "parameter_servers": 1}
    code, lines = finish(start(tmp_path, spec, script))

    assert code == 5
    assert lines[0].startswith("rank 2 of 3 ended with exit code 5; the other 2 were ended.")


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


def test_when_one_rank_fails_the_ends_of_all_logs_come_by_rank_and_its_own_comes_last(
    tmp_path: Path,
):
    script = """
        import os, sys, time
        rank = int(os.environ["RANK"])
        for line in range(3 - rank, 9):
            print("line", line, flush=True)
        if rank == 1:
            time.sleep(3)  # until all others have printed theirs
            sys.exit("out of data")
        time.sleep(600)
        """
    code, lines = finish(start(tmp_path, PYTORCH, script))

    assert code == 1
    at = [lines.index(f"The end of the log of rank {rank}:") for rank in (0, 2, 3)]
    assert at == sorted(at)
    assert lines[at[0] + 1 : at[1]] == ["  line 6", "  line 7", "  line 8"]
    assert lines[-1] == "  out of data"


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
            print("out of data", flush=True)
            sys.exit(3)
        time.sleep(600)
        """
    spec = {"framework": "mpi", "nodes": 1, "processes_per_node": 2, "parameter_servers": 0}

    code, lines = finish(start(tmp_path, spec, script))

    assert code == 3
    told = lines.index(
        "rank 1 of 2 ended with exit code 3; the others were ended. The end of its log:"
    )
    assert lines[told + 1] == "  out of data"


# MPICH has no Python package in the distribution beside Open MPI's: the library is called as it is.
MPICH_REDUCE = """
    import ctypes, ctypes.util
    mpi = ctypes.CDLL("libmpich.so.12")
    INT, SUM, WORLD = 0x4C000405, 0x58000003, 0x44000000
    mpi.MPI_Init(None, None)
    rank, total = ctypes.c_int(), ctypes.c_int()
    mpi.MPI_Comm_rank(WORLD, ctypes.byref(rank))
    mine = ctypes.c_int(rank.value + 1)
    mpi.MPI_Allreduce(ctypes.byref(mine), ctypes.byref(total), 1, INT, SUM, WORLD)
    print("total", total.value, flush=True)
    if rank.value == 1 and __import__("sys").argv[1:]:
        __import__("os")._exit(3)
    mpi.MPI_Finalize()
    """


@pytest.fixture
def mpich_path(tmp_path: Path) -> str:
    """A ``PATH`` on which mpirun is MPICH's, whatever else is installed."""
    mpirun = shutil.which("mpirun.mpich")
    if mpirun is None:
        missing("no mpirun of MPICH")
        raise AssertionError
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mpirun"  # no link: it looks for its helpers beside itself
    program.write_text(f'#!/bin/sh\nexec {mpirun} "$@"\n')
    program.chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_real_processes_of_mpich_reduce_and_one_that_fails_is_told_of(
    tmp_path: Path, mpich_path: str
):
    spec = {"framework": "mpi", "nodes": 1, "processes_per_node": 3, "parameter_servers": 0}
    env = {"PATH": mpich_path}

    code, lines = finish(start(tmp_path / "good", spec, MPICH_REDUCE, env=env))
    assert code == 0, lines
    assert {f"[rank {rank}] total 6" for rank in range(3)} <= set(lines)

    bad = start(tmp_path / "bad", spec, MPICH_REDUCE, env=env, arguments=["fail"])
    code, lines = finish(bad)
    assert code == 3, lines
    assert lines[-2:] == [
        "rank 1 of 3 ended with exit code 3; the others were ended. The end of its log:",
        "  total 6",
    ]


def test_ranks_of_mpi_may_use_every_processor(tmp_path: Path):
    if shutil.which("mpirun") is None:
        missing("no mpirun")
    spec = {"framework": "mpi", "nodes": 1, "processes_per_node": 2, "parameter_servers": 0}
    script = "import os; print('may use', sorted(os.sched_getaffinity(0)))"

    code, lines = finish(start(tmp_path, spec, script))

    # Bound to one each, those of the next step on this machine would be bound to the same ones.
    own = sorted(os.sched_getaffinity(0))
    assert code == 0
    assert {f"[rank {rank}] may use {own}" for rank in range(2)} <= set(lines)


def test_without_mpirun_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = {"framework": "mpi", "nodes": 1, "processes_per_node": 2, "parameter_servers": 0}
    monkeypatch.setenv("PATH", str(tmp_path))

    code, lines = finish(start(tmp_path, spec, ""))

    assert code == 127
    assert "install an MPI" in lines[0]


# ---- several nodes: the others are played by the test itself ----


NODES = {"framework": "pytorch", "nodes": 2, "processes_per_node": 1, "parameter_servers": 0}
TOKEN = "a token"
BEGIN = """
    import os, time
    print("began as", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
    time.sleep(float(os.environ.get("SECONDS", "0")))
    """


def start_node(root: Path, wait: float, **options):
    """Start node 0 of two; return its process and the port where it waits for the other."""
    (port,) = free_ports(1)
    told = {"node": 0, "hosts": ["127.0.0.1", "far"], "port": port, "wait_seconds": wait}
    more = {"MLP_GANG": json.dumps(told), "MLP_GANG_TOKEN": TOKEN, **options.pop("env", {})}
    return start(root, NODES, BEGIN, env=more, **options), port


def connect(port: int, token: str = TOKEN) -> Connection:
    deadline = time.monotonic() + 30
    while True:
        try:
            return Connection.make("127.0.0.1", port, token)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_nothing_begins_without_all_nodes_and_the_missing_ones_are_named(
    tmp_path: Path, python: str
):
    gang, _ = start_node(tmp_path, 1.5, python=python)
    code, lines = finish(gang)

    assert code == 143
    assert lines[-1] == "of 2 nodes, node 1 (far) did not come within 1.5 seconds"
    assert not any("began" in line for line in lines)


def test_a_gang_begins_with_its_last_node_and_ends_well_with_the_last_to_be_done(
    tmp_path: Path, python: str
):
    gang, port = start_node(tmp_path, 60, python=python)
    other = connect(port)
    other.send(kind="join", node=1, offer={"ports": []})
    told = other.receive()
    time.sleep(0.5)
    assert gang.poll() is None
    other.send(kind="done")

    assert told["kind"] == "start"
    assert len(told["plan"]["offers"]) == 2
    assert other.receive()["kind"] == "end"
    code, lines = finish(gang)
    assert (code, lines[-1]) == (0, "[rank 0] began as 0 of 2")


@pytest.mark.parametrize("how", ["fails", "is lost"])
def test_a_node_ends_with_another_that(tmp_path: Path, how: str):
    gang, port = start_node(tmp_path, 60, env={"SECONDS": "600"})
    other = connect(port)
    other.send(kind="join", node=1, offer={"ports": []})
    other.receive()
    if how == "fails":
        other.send(kind="failed", code=3, why="rank 1 ended with exit code 3")
    other.close()
    code, lines = finish(gang)

    assert code == 143
    said = (
        "node 1 (far): rank 1 ended with exit code 3" if how == "fails" else "node 1 (far) was lost"
    )
    assert lines[-1] == f"node 0 (127.0.0.1) ends, because of {said}"


def test_a_node_that_had_too_many_open_files_hears_the_others_again(tmp_path: Path):
    gang, port = start_node(tmp_path, 60)
    connect(port).close()  # until it listens
    node = psutil.Process(gang.pid)
    before = node.rlimit(psutil.RLIMIT_NOFILE)
    node.rlimit(psutil.RLIMIT_NOFILE, (3, before[1]))
    with socket.create_connection(("127.0.0.1", port)):
        time.sleep(0.5)
        node.rlimit(psutil.RLIMIT_NOFILE, before)
        other = connect(port)
        other.send(kind="join", node=1, offer={"ports": []})
        assert other.receive()["kind"] == "start"
    other.send(kind="done")
    assert other.receive()["kind"] == "end"
    code, lines = finish(gang)
    assert (code, lines[-1]) == (0, "[rank 0] began as 0 of 2")


def test_who_lacks_the_token_can_neither_join_nor_start_a_command(tmp_path: Path):
    gang, port = start_node(tmp_path, 60)
    connect(port).close()  # until it listens
    with pytest.raises(LostError):
        Connection.make("127.0.0.1", port, "another token")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"kind": "shell", "command": "touch stolen"}\n' * 3)
        stranger.settimeout(10)
        said = b""
        while data := stranger.recv(1000):
            said += data
    gang.terminate()
    finish(gang)

    assert TOKEN.encode() not in said
    assert not (tmp_path / "code" / "stolen").exists()


def test_a_port_that_is_taken_is_named_and_not_the_program_blamed(tmp_path: Path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        told = {"node": 0, "hosts": ["127.0.0.1", "far"], "port": port, "wait_seconds": 5}
        more = {"MLP_GANG": json.dumps(told), "MLP_GANG_TOKEN": TOKEN}
        code, lines = finish(start(tmp_path, NODES, BEGIN, env=more))

    assert code == 1
    why = f"port {port} can't be listened on: Address already in use"
    assert lines[-1] == f"this node can't take part: {why}"


def test_ports_of_ranks_are_nobody_else_s_until_they_listen():
    with Ports(2) as ports:
        first, second = ports.numbers
        assert first != second
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", first))
        # As PyTorch's store and TensorFlow's servers do.
        place = ("127.0.0.1", first)
        with socket.create_server(("", first)) as server, socket.create_connection(place):
            server.accept()[0].close()
        with socket.create_server(("::", second), family=socket.AF_INET6, dualstack_ipv6=True):
            pass


def test_a_command_on_a_node_is_handed_back_what_it_prints_and_its_exit_code(
    tmp_path: Path, python: str
):
    gang, port = start_node(tmp_path, 60, python=python)
    connect(port).close()
    told = {"node": 1, "hosts": ["127.0.0.1", "far"], "port": port, "wait_seconds": 1}
    shell = [python, "-m", "airflow_mlpipelines.runtime.node_shell", "-x"]

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*shell, *words],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(stage_runtime(tmp_path / "runtime")),
                "MLP_GANG": json.dumps(told),
                "MLP_GANG_TOKEN": TOKEN,
            },
            capture_output=True,
            text=True,
            timeout=30,
        )

    done = ask("127.0.0.1", "printf", "'out\\n';", "echo err >&2;", "exit 7")
    unknown = ask("elsewhere", "true")
    gang.terminate()
    finish(gang)

    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert unknown.returncode == 255
    assert "'elsewhere' is no node of this gang, which has 127.0.0.1, far" in unknown.stderr
