"""Several processes that work as one: started together, told of each other, ended together.

``python -m airflow_mlpipelines.runtime.gang '{"framework": …}' -- program arguments`` runs inside a step's
process or container and starts the program once for each rank, with the variables by which PyTorch or
TensorFlow find each other; for MPI it starts the machine's own ``mpirun``. Lines come out with their rank
before them, and are kept by rank in ``logs/``. When one rank fails, the others are ended, and the end of its
log is the last thing that is printed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import IO, Any

MPI, PYTORCH, TENSORFLOW = "mpi", "pytorch", "tensorflow"
_HOST = "127.0.0.1"
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_TAIL_LINES = 20
_NOT_FOUND = 127
_SIGNALLED = 128
_LOGS = "logs"
_ONE_RANK = "one-rank"
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


class Rank:
    """One process of the gang, with a thread that takes in what it prints."""

    def __init__(self, number: int, command: list[str], variables: dict[str, str]) -> None:
        self.number = number
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be ended with all that it has started
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def code(self) -> int | None:
        """Its exit code, as a shell has it (128 and more for a signal); None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else _SIGNALLED - code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it has started in its session."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def finish(self) -> None:
        """Wait a moment for the rest of what it printed."""
        self._thread.join(_GRACE_SECONDS)

    def _read(self) -> None:
        lines: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        with Path(_LOGS, f"std_log_process_{self.number}.txt").open("wb") as kept:
            for line in lines:
                kept.write(line)
                kept.flush()
                self.tail.append(line.decode("utf-8", "replace").rstrip("\r\n"))
                _print(b"[rank %d] " % self.number + line.rstrip(b"\r\n"))


_printing = threading.Lock()


def _print(line: bytes) -> None:
    """Write one line whole, whatever other ranks print at the same time."""
    with _printing:
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


def _say(text: str) -> None:
    _print(text.encode("utf-8", "replace"))


def run(spec: dict[str, Any], command: list[str]) -> int:
    """Run the gang to its end; return 0, or the exit code of the rank that failed first.

    Args:
        spec: ``framework``, ``nodes``, ``processes_per_node`` and ``parameter_servers``.
        command: The program and its arguments.
    """
    Path(_LOGS).mkdir(exist_ok=True)
    if spec["framework"] == MPI:
        return _run_mpi(spec["nodes"] * spec["processes_per_node"], command)
    ranks: list[Rank] = []
    try:
        for number, variables in enumerate(make_variables(spec)):
            ranks.append(Rank(number, command, variables))
        failed = _wait(ranks)
    finally:
        _end(ranks)
    if failed is None:
        return 0
    code = failed.code or 1
    others = f"; the other {len(ranks) - 1} were ended" if len(ranks) > 1 else ""
    _say(
        f"rank {failed.number} of {len(ranks)} ended with exit code {code}{others}. The end of its log:"
    )
    for line in failed.tail:
        _say(f"  {line}")
    return code


def make_variables(spec: dict[str, Any]) -> list[dict[str, str]]:
    """Return each rank's variables, as its framework expects them (torchrun's, or TF_CONFIG)."""
    if spec["framework"] == PYTORCH:
        return _variables_of_pytorch(spec["nodes"], spec["processes_per_node"])
    return _variables_of_tensorflow(
        spec["nodes"] * spec["processes_per_node"], spec["parameter_servers"]
    )


def _variables_of_pytorch(nodes: int, processes: int) -> list[dict[str, str]]:
    (port,) = _free_ports(1)
    shared = {
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(nodes * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_WORLD_SIZE": str(nodes),
    }
    if nodes * processes > 1:  # as torchrun does: else each rank takes all the processors
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return [
        {
            **shared,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % processes),
            "GROUP_RANK": str(rank // processes),
            "NODE_RANK": str(rank // processes),
        }
        for rank in range(nodes * processes)
    ]


def _variables_of_tensorflow(workers: int, servers: int) -> list[dict[str, str]]:
    addresses = [f"{_HOST}:{port}" for port in _free_ports(workers + servers)]
    cluster = {"worker": addresses[:workers]}
    if servers:
        cluster["ps"] = addresses[workers:]
    return [
        {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}
        for kind, count in (("worker", workers), ("ps", servers))
        for index in range(count)
    ]


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now. All are looked for at once, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((_HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _wait(ranks: list[Rank]) -> Rank | None:
    """Return the first rank that fails, or None when all have ended well."""
    running = list(ranks)
    while running:
        for rank in list(running):
            if rank.code is None:
                continue
            if rank.code != 0:
                return rank
            running.remove(rank)
        time.sleep(_POLL_SECONDS)
    return None


def _end(ranks: list[Rank]) -> None:
    """End what still runs: five seconds after SIGTERM, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [rank for rank in ranks if rank.code is None]
        for rank in running:
            rank.signal(number)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and any(rank.code is None for rank in running):
            time.sleep(_POLL_SECONDS)
    for rank in ranks:
        rank.finish()


def _run_mpi(processes: int, command: list[str]) -> int:
    """Run the machine's ``mpirun``, whichever implementation it is of, with this module for each rank.

    Its own way to tell ranks apart marks every piece that a process writes, in the middle of lines too.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        _say("there is no mpirun on the PATH: install an MPI (Open MPI, MPICH) in the environment")
        return _NOT_FOUND
    variables = {
        # Open MPI: more processes than processors, and root inside a container, are meant here.
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.run(
        [
            mpirun,
            "-n",
            str(processes),
            sys.executable,
            "-m",
            __spec__.name,
            _ONE_RANK,
            "--",
            *command,
        ],
        env={**os.environ, **variables},
        check=False,
    ).returncode


def _run_one_rank(command: list[str]) -> int:
    """Run the program as the rank that MPI has made this process; return its exit code."""
    number = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
    rank = Rank(int(number), command, {})
    try:
        _wait([rank])
    finally:
        _end([rank])
    return rank.code or 0


def main() -> int:
    """Run what the arguments say; return the exit code."""
    spec, separator, *command = sys.argv[1:]
    if separator != "--" or not command:
        _say("usage: gang SPEC -- PROGRAM [ARGUMENT…]")
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(_SIGNALLED + signal.SIGTERM))
    try:
        return _run_one_rank(command) if spec == _ONE_RANK else run(json.loads(spec), command)
    except OSError as error:
        _say(f"{command[0]!r} could not be started: {error.strerror or error}")
        return _NOT_FOUND


if __name__ == "__main__":
    sys.exit(main())
