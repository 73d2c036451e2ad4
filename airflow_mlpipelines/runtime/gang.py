"""Several processes that work as one: started together, told of each other, ended together.

``python -m airflow_mlpipelines.runtime.gang '{"framework": …}' -- program arguments`` runs inside a step's
process or container and starts the program once for each rank, with the variables by which PyTorch or
TensorFlow find each other; for MPI it starts the environment's own ``mpirun``. Lines come out with their
rank before them, and are kept by rank in ``logs/``. When one rank fails, the others are ended, and the end
of its log is the last thing that is printed.

Where the gang has several nodes, this runs on each, and nothing of the program begins before all of them
have met (:mod:`airflow_mlpipelines.runtime.nodes`). Without them, all ranks run on this machine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines.runtime import ranks
from airflow_mlpipelines.runtime.mpi import (
    ONE_RANK,
    NoMpiError,
    make_node_shell,
    read_report,
    reports,
    run_one_rank,
    start_mpirun,
)
from airflow_mlpipelines.runtime.nodes import FOLLOWED, TOKEN, NotTogetherError, Place, meet
from airflow_mlpipelines.runtime.rendezvous import (
    HERE,
    MPI,
    Ports,
    count_ports,
    gpus_of_node,
    is_decisive,
    make_variables,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from airflow_mlpipelines.runtime.nodes import Nodes

_BROKEN = 1
_NOT_FOUND = 127
_MPIRUN_SECONDS = 5.0
_LINES_OF_OTHERS = 3


def run(spec: dict[str, Any], command: Sequence[str]) -> int:
    """Run the gang, or this node of it, to the end of all; return 0, or the exit code of what failed.

    Args:
        spec: ``framework``, ``nodes``, ``processes_per_node``, ``parameter_servers`` and ``chief``.
        command: The program and its arguments.

    Raises:
        NotTogetherError: Some nodes have not come.
        NoMpiError: There is no ``mpirun``.
    """
    Path(ranks.LOGS).mkdir(exist_ok=True)
    place = Place.from_environment()
    return _run_alone(spec, command) if place is None else _run_node(spec, command, place)


def _run_alone(spec: dict[str, Any], command: Sequence[str]) -> int:
    nodes = spec["nodes"]
    if spec["framework"] == MPI:
        return _run_mpi_alone(spec, command)
    programs: list[ranks.Program] = []
    count = sum(count_ports(spec, node) for node in range(nodes))
    with Ports(count, HERE) as reserved, ranks.ending(programs):
        every = list(reserved.numbers)
        ports = [[every.pop() for _ in range(count_ports(spec, node))] for node in range(nodes)]
        for node, of_node in enumerate(make_variables(spec, [HERE] * nodes, ports)):
            gpus = gpus_of_node(node)
            ranks_of_node = [(number, {**gpus, **own}) for number, own in of_node]
            _start_ranks(programs, spec, ranks_of_node, command)
        failed = ranks.wait(programs)
    if failed is None:
        return 0
    return _tell_of(failed, programs, _count(spec), f"the other {len(programs) - 1} were ended")


def _run_mpi_alone(spec: dict[str, Any], command: Sequence[str]) -> int:
    processes = spec["nodes"] * spec["processes_per_node"]
    with reports() as folder:
        mpirun = start_mpirun(processes, command, dict(os.environ))
        with ranks.ending([mpirun]):
            while mpirun.code is None and read_report(folder) is None:
                time.sleep(ranks.POLL_SECONDS)
            code = _await(mpirun)
        report = read_report(folder)
    if report is not None:
        return _tell_of_rank(report, processes, "; the others were ended")
    return code


def _await(mpirun: ranks.Program) -> int:
    """Return the exit code of mpirun, which has a moment to end by itself: it says why, and ends the other ranks."""
    deadline = time.monotonic() + _MPIRUN_SECONDS
    while mpirun.code is None and time.monotonic() < deadline:
        time.sleep(ranks.POLL_SECONDS)
    return 1 if mpirun.code is None else mpirun.code


def _run_node(spec: dict[str, Any], command: Sequence[str], place: Place) -> int:
    ranks.say(f"{place.name(place.node)} waits for the other {len(place.hosts) - 1}")
    if spec["framework"] == MPI:
        make_node_shell(place)
    with Ports(count_ports(spec, place.node)) as reserved:
        nodes = meet(place, {"ports": reserved.numbers})
        ranks.say(f"{place.name(place.node)}: all {len(place.hosts)} nodes are there")
        programs: list[ranks.Program] = []
        try:
            with ranks.ending(programs):
                _start_node(spec, command, place, nodes, programs)
                return _attend(spec, programs, nodes, place)
        finally:
            nodes.close()


def _start_node(
    spec: dict[str, Any],
    command: Sequence[str],
    place: Place,
    nodes: Nodes,
    programs: list[ranks.Program],
) -> None:
    """Start what runs on this node, noting it in ``programs``; if that fails, the others end."""
    try:
        if spec["framework"] != MPI:
            ports = [offer["ports"] for offer in nodes.plan["offers"]]
            mine = make_variables(spec, place.hosts, ports)[place.node]
            _start_ranks(programs, spec, mine, command)
        elif place.node == 0:
            environment = dict(os.environ)
            programs.append(start_mpirun(spec["processes_per_node"], command, environment, place))
    except (ranks.NotStartedError, NoMpiError) as error:
        nodes.fail(_NOT_FOUND, str(error))
        raise


def _attend(
    spec: dict[str, Any], programs: Sequence[ranks.Program], nodes: Nodes, place: Place
) -> int:
    """Return this node's exit code, once all has ended well or something has failed somewhere."""
    while True:
        if nodes.report is not None:
            return _blame(spec, nodes.report, programs, nodes, place)
        failed = ranks.find_failed(programs)
        if failed is not None:
            code = failed.code or 1
            number = getattr(failed, "number", None)
            what = "mpirun" if number is None else f"rank {number}"
            nodes.fail(code, f"{what} ended with exit code {code}")
            ranks.end(programs)
            others = f"it ran on {place.name(place.node)}; all others were ended"
            return _tell_of(failed, programs, _count(spec), others)
        if ranks.are_done(programs):
            nodes.done()
        verdict = nodes.verdict()
        if verdict is not None:
            code, why = verdict
            if code not in (0, FOLLOWED):  # a rank that mpirun on node 0 has started here
                ranks.say(why)
                for line in nodes.blamed_for:
                    ranks.say(f"  {line}")
            elif code:
                ranks.say(f"{place.name(place.node)} ends, because of {why}")
            return code
        time.sleep(ranks.POLL_SECONDS)


def _blame(
    spec: dict[str, Any],
    report: dict[str, Any],
    programs: Sequence[ranks.Program],
    nodes: Nodes,
    place: Place,
) -> int:
    """Have the node answer for it on which a rank of mpirun's has failed; return node 0's exit code."""
    for mpirun in programs:
        _await(mpirun)
    ranks.end(programs)
    host = place.find_host(report["host"])
    node = 0 if host is None else place.hosts.index(host)
    others = f"; it ran on {place.name(node)}; all others were ended"
    if node == 0:
        code = _tell_of_rank(report, _count(spec), others)
        nodes.fail(code, f"rank {report['rank']} ended with exit code {code}")
        return code
    why = _describe(report, _count(spec), others)
    nodes.blame(node, report["code"], why, report["tail"])
    ranks.say(
        f"{place.name(0)} ends, because of {place.name(node)}: rank {report['rank']} ended with "
        f"exit code {report['code']}"
    )
    return FOLLOWED


def _describe(report: dict[str, Any], count: int, others: str) -> str:
    others = others if count > 1 else ""
    return (
        f"rank {report['rank']} of {count} ended with exit code {report['code']}{others}. "
        "The end of its log:"
    )


def _tell_of_rank(report: dict[str, Any], count: int, others: str) -> int:
    """Print the end of the log of a rank that failed; return its exit code."""
    ranks.say(_describe(report, count, others))
    for line in report["tail"]:
        ranks.say(f"  {line}")
    return int(report["code"])


def _start_ranks(
    programs: list[ranks.Program],
    spec: dict[str, Any],
    of_node: Sequence[tuple[int, dict[str, str]]],
    command: Sequence[str],
) -> None:
    for number, variables in of_node:
        rank = ranks.Rank(number, command, {**_own_environment(), **variables})
        rank.decides = is_decisive(spec, variables)
        programs.append(rank)


def _own_environment() -> dict[str, str]:
    """Return the variables for a program, which need not know how nodes trust each other."""
    return {name: value for name, value in os.environ.items() if name != TOKEN}


def _count(spec: dict[str, Any]) -> int:
    chief = int(spec.get("chief", False))
    return int(spec["nodes"] * spec["processes_per_node"] + spec["parameter_servers"] + chief)


def _tell_of(
    failed: ranks.Program, programs: Sequence[ranks.Program], count: int, others: str
) -> int:
    """Print the ends of all ranks' logs, that of the one that failed last; return its exit code."""
    code = failed.code or 1
    if isinstance(failed, ranks.Rank):
        for each in programs:
            if isinstance(each, ranks.Rank) and each is not failed and each.tail:
                ranks.say(f"The end of the log of rank {each.number}:")
                for line in list(each.tail)[-_LINES_OF_OTHERS:]:
                    ranks.say(f"  {line}")
        report = {"rank": failed.number, "code": code, "tail": failed.tail}
        return _tell_of_rank(report, count, f"; {others}")
    return code


def main() -> int:
    """Run what the arguments say; return the exit code."""
    spec, separator, *command = sys.argv[1:]
    if separator != "--" or not command:
        ranks.say("usage: gang SPEC -- PROGRAM [ARGUMENT…]")
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(ranks.SIGNALLED + signal.SIGTERM))
    try:
        if spec == ONE_RANK:
            return run_one_rank(command, _own_environment())
        return run(json.loads(spec), command)
    except NotTogetherError as error:
        ranks.say(str(error))
        return FOLLOWED
    except (NoMpiError, ranks.NotStartedError) as error:
        ranks.say(str(error))
        return _NOT_FOUND
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        ranks.say(f"this node can't take part: {error.strerror or error}{where}")
        return _BROKEN


if __name__ == "__main__":
    sys.exit(main())
