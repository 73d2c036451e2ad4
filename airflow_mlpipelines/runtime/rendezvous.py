"""How the processes of a gang find each other: the variables that PyTorch and TensorFlow expect."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

CHIEF = "chief"
MPI, PYTORCH, TENSORFLOW = "mpi", "pytorch", "tensorflow"
HERE = "127.0.0.1"
GPUS_PER_NODE = "MLP_GPUS_PER_NODE"
"""Set where one machine has been given the GPUs of several nodes: how many of them each has."""
_GPU_LISTS = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def count_ports(spec: dict[str, Any], node: int) -> int:
    """Return how many free ports a node has to offer to the others."""
    if spec["framework"] == TENSORFLOW:
        return sum(1 for _, _, place in _tensorflow_tasks(spec) if place == node)
    return 1


def make_variables(
    spec: dict[str, Any], hosts: Sequence[str], ports: Sequence[Sequence[int]]
) -> list[list[tuple[int, dict[str, str]]]]:
    """Return for every node its ranks, each with its number and its variables.

    Args:
        spec: ``framework``, ``nodes``, ``processes_per_node``, ``parameter_servers`` and ``chief``.
        hosts: Every node's name.
        ports: Every node's free ports, as many as :func:`count_ports` says.
    """
    if spec["framework"] == PYTORCH:
        return _variables_of_pytorch(spec["processes_per_node"], hosts, ports[0][0])
    return _variables_of_tensorflow(spec, hosts, ports)


def is_decisive(spec: dict[str, Any], variables: dict[str, str]) -> bool:
    """Return whether a gang is done only when the rank with these variables is.

    Parameter servers serve for ever, and so do the workers of a chief.
    """
    if spec["framework"] != TENSORFLOW:
        return True
    kind = json.loads(variables["TF_CONFIG"])["task"]["type"]
    return bool(kind == (CHIEF if spec.get("chief") else "worker"))


def gpus_of_node(node: int) -> dict[str, str]:
    """Return the variables by which the ranks of a node see its share of the GPUs; none if all see the same."""
    each = int(os.environ.get(GPUS_PER_NODE, "0"))
    if not each:
        return {}
    return {
        name: ",".join(os.environ[name].split(",")[node * each : (node + 1) * each])
        for name in _GPU_LISTS
        if name in os.environ
    }


class Ports:
    """Ports that nobody listens on, kept from being given to anybody until the end of the block.

    A socket that is bound and does not listen keeps the kernel from choosing its port for others. Whoever
    listens with ``SO_REUSEADDR``, as PyTorch and TensorFlow do, may have it.
    """

    def __init__(self, count: int, host: str = "") -> None:
        self._sockets = [socket.socket() for _ in range(count)]
        try:
            for each in self._sockets:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                each.bind((host, 0))
        except BaseException:
            self.__exit__()
            raise
        self.numbers = [int(each.getsockname()[1]) for each in self._sockets]

    def __enter__(self) -> Ports:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()


def _variables_of_pytorch(
    processes: int, hosts: Sequence[str], port: int
) -> list[list[tuple[int, dict[str, str]]]]:
    nodes = len(hosts)
    shared = {
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(nodes * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_WORLD_SIZE": str(nodes),
    }
    if (
        processes * hosts.count(hosts[0]) > 1
    ):  # as torchrun does: else each rank takes all the processors
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return [
        [
            (
                node * processes + local,
                {
                    **shared,
                    "RANK": str(node * processes + local),
                    "LOCAL_RANK": str(local),
                    "GROUP_RANK": str(node),
                    "NODE_RANK": str(node),
                },
            )
            for local in range(processes)
        ]
        for node in range(nodes)
    ]


def _tensorflow_tasks(spec: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Return every task's kind, its number, and its node: workers in blocks, servers dealt out in turn."""
    nodes, workers = spec["nodes"], spec["processes_per_node"]
    tasks = [(CHIEF, 0, 0)] if spec.get("chief") else []
    tasks += [("worker", number, number // workers) for number in range(nodes * workers)]
    return tasks + [("ps", number, number % nodes) for number in range(spec["parameter_servers"])]


def _variables_of_tensorflow(
    spec: dict[str, Any], hosts: Sequence[str], ports: Sequence[Sequence[int]]
) -> list[list[tuple[int, dict[str, str]]]]:
    left = [list(offered) for offered in ports]
    cluster: dict[str, list[str]] = {}
    tasks = _tensorflow_tasks(spec)
    for kind, _, node in tasks:
        cluster.setdefault(kind, []).append(f"{hosts[node]}:{left[node].pop(0)}")
    found: list[list[tuple[int, dict[str, str]]]] = [[] for _ in hosts]
    for rank, (kind, number, node) in enumerate(tasks):
        config = {"cluster": cluster, "task": {"type": kind, "index": number}}
        found[node].append((rank, {"TF_CONFIG": json.dumps(config)}))
    return found
