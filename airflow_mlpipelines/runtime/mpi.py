"""An MPI program: the environment's own ``mpirun``, on this machine alone or over the nodes of a gang.

Over several nodes, ``mpirun`` runs on node 0. It starts its daemons on the others through what it takes for
ssh (:mod:`airflow_mlpipelines.runtime.node_shell`): images need no sshd, and nobody needs keys.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines.runtime import ranks
from airflow_mlpipelines.runtime.connection import LostError
from airflow_mlpipelines.runtime.nodes import Place, report_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

ONE_RANK = "one-rank"
_GANG = "airflow_mlpipelines.runtime.gang"
_SHELL = "airflow_mlpipelines.runtime.node_shell"
_REPORTS = "MLP_GANG_REPORTS"
_SHELL_NAME = "node-shell"
_NAME_LENGTH = 16
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_ENDED_BY_OTHERS = ranks.SIGNALLED + 15
# More processes than processors, and root inside a container, are meant here.
_ANYWHERE = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    # By what the file of hosts says, and not by cores, as for two ranks: both would go to node 0.
    "OMPI_MCA_rmaps_base_mapping_policy": "slot",
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Several steps or containers share a machine: all of them would be bound to its first processors.
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "I_MPI_PIN": "off",
    # A container may not read another process's memory, which MPICH fails at instead of doing without.
    "MPIR_CVAR_CH4_CMA_ENABLE": "0",
}


class NoMpiError(Exception):
    """The environment has no ``mpirun``."""


def start_mpirun(
    processes: int, command: Sequence[str], environment: dict[str, str], place: Place | None = None
) -> ranks.Program:
    """Return ``mpirun`` with ``processes`` on each node, whichever implementation it is of.

    Its own way to tell ranks apart marks every piece that a process writes, in the middle of lines too: so
    each rank is run by this package.

    Raises:
        NoMpiError: There is none; the message says what to do.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise NoMpiError(
            "there is no mpirun on the PATH: install an MPI (Open MPI, MPICH) in the environment"
        )
    options: list[str] = []
    nodes = 1
    variables = dict(_ANYWHERE)
    if place is not None:
        nodes = len(place.hosts)
        variables.update(_variables_of_nodes(place, processes))
        if _is_hydra(mpirun):  # else it is called back by a name that other nodes may not know
            options = ["-localhost", place.hosts[0]]
    one_rank = [sys.executable, "-m", _GANG, ONE_RANK, "--", *command]
    return ranks.Program(
        [mpirun, *options, "-n", str(processes * nodes), *one_rank], {**variables, **environment}
    )


def make_node_shell(place: Place) -> Path:
    """Return a folder with the program that stands for ssh, the same one on every node.

    Open MPI's daemons look for it too, though it is node 0 that starts all of them.
    """
    name = sha256(place.token.encode()).hexdigest()[:_NAME_LENGTH]
    folder = Path(tempfile.gettempdir(), f"mlp-mpi-{name}")
    folder.mkdir(mode=0o700, exist_ok=True)
    shell = folder / _SHELL_NAME
    shell.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {_SHELL} "$@"\n', encoding="utf-8"
    )
    shell.chmod(0o700)
    return folder


def run_one_rank(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run the program as the rank that MPI has made this process; return its exit code."""
    number = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
    Path(ranks.LOGS).mkdir(exist_ok=True)
    # MPICH's processes talk to their daemon through a file that they are given open.
    rank = ranks.Rank(int(number), command, environment, inherit=True)
    with ranks.ending([rank]):
        ranks.wait([rank])
    code = rank.code or 0
    if code not in (0, _ENDED_BY_OTHERS):
        ranks.say(f"rank {number} ended with exit code {code}")
        _report(
            {
                "rank": int(number),
                "host": socket.gethostname(),
                "code": code,
                "tail": list(rank.tail),
            }
        )
    return code


@contextmanager
def reports() -> Iterator[Path]:
    """Return a folder, for the time of the block, in which the ranks of this machine tell of their failure."""
    with tempfile.TemporaryDirectory(prefix="mlp-mpi-reports-") as folder:
        os.environ[_REPORTS] = folder
        yield Path(folder)


def read_report(folder: Path) -> dict[str, Any] | None:
    """Return what the first rank that failed has told in ``folder``; None if none has."""
    told = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(told[0].read_text(encoding="utf-8")) if told else None


def _report(report: dict[str, Any]) -> None:
    """Tell of a rank that has failed: mpirun says of it no more than a number."""
    place = Place.from_environment()
    folder = os.environ.get(_REPORTS)
    with suppress(OSError, LostError):  # then nobody learns more than the exit code
        if place is not None:
            report_rank(place, **report)
        elif folder is not None:
            file = Path(folder, f"{report['rank']}.json")
            file.with_suffix(".new").write_text(json.dumps(report), encoding="utf-8")
            file.with_suffix(".new").rename(file)


def _variables_of_nodes(place: Place, processes: int) -> dict[str, str]:
    """Return what tells each implementation the nodes, and how to start its daemons there."""
    folder = make_node_shell(place)
    shell = folder / _SHELL_NAME
    hosts, slots = folder / "hosts", folder / "slots"
    lines = [host for host in place.hosts for _ in range(processes)]
    hosts.write_text("".join(f"{host}\n" for host in lines), encoding="utf-8")
    # A host that Open MPI finds once, and without a number, has as many places as processors.
    lines = [f"{host} slots={processes}" for host in place.hosts]
    slots.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {
        "OMPI_MCA_plm": "rsh",
        "OMPI_MCA_plm_rsh_agent": str(shell),
        "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
        # Daemons that go into the background fail unseen, and mpirun waits for them for ever.
        "OMPI_MCA_orte_leave_session_attached": "1",
        "OMPI_MCA_orte_default_hostfile": str(slots),
        "PRTE_MCA_plm": "ssh",
        "PRTE_MCA_plm_ssh_agent": str(shell),
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
        "PRTE_MCA_prte_leave_session_attached": "1",
        "PRTE_MCA_prte_default_hostfile": str(slots),
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": str(shell),
        "HYDRA_HOST_FILE": str(hosts),
        "I_MPI_HYDRA_BOOTSTRAP": "ssh",
        "I_MPI_HYDRA_BOOTSTRAP_EXEC": str(shell),
        "I_MPI_HYDRA_HOST_FILE": str(hosts),
    }


def _is_hydra(mpirun: str) -> bool:
    told = subprocess.run([mpirun, "--version"], capture_output=True, check=False).stdout
    return b"HYDRA build details" in told
