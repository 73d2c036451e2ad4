"""Processes that want the same things at the same moment, on any metadata database."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.index import CacheEntry, MetadataIndex
from airflow_mlpipelines.caching.lease import Held, Leases
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from collections.abc import Callable

SPAWN = multiprocessing.get_context("spawn")


def make_fingerprint(number: int) -> str:
    return f"{number:064x}"


def make_artifact(name: str = "out", *, content: int = 0) -> Artifact:
    return Artifact(f"memory://store/{name}", f"blake3:{content:064x}", 1, 1, "file")


def make_entry(number: int, **fields: Any) -> CacheEntry:
    defaults: dict[str, Any] = {
        "fingerprint": make_fingerprint(number),
        "pipeline": "pipeline",
        "step": "step",
        "step_type": "CommandStep",
        "outputs": {"out": make_artifact()},
        "ingredients": {"step": {"version": "1"}, "code": None},
        "seconds": 1.5,
        "writer": "test",
        "step_run": "mlp-1",
    }
    return CacheEntry(**{**defaults, **fields})


def run_processes(count: int, target: Callable[..., None], *args: Any) -> None:
    """Run ``target(barrier, number, *args)`` in this many processes; all have to end well."""
    barrier = SPAWN.Barrier(count)
    processes = [
        SPAWN.Process(target=target, args=(barrier, number, *args)) for number in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count


def open_at_once(barrier: Any, number: int, url: str) -> None:
    """Be the first to use a database, together with others."""
    barrier.wait()
    MetadataIndex(url).put_entry(make_entry(number))


def produce_once(barrier: Any, number: int, url: str, rounds: int, log: str) -> None:
    """Want the same outputs as the others, round after round; note in ``log`` who made them."""
    index = MetadataIndex(url)
    leases = Leases(index)
    barrier.wait()
    for place in range(rounds):
        fingerprint = make_fingerprint(place)
        while not index.find_entries([fingerprint]):
            lease = leases.acquire(fingerprint, f"process {number}", ttl=30)
            if isinstance(lease, Held):
                time.sleep(0.002)
                continue
            if not index.find_entries([fingerprint]):  # as a step does, once it holds the lease
                with Path(log).open("a") as lines:
                    lines.write(f"{place}\n")
                index.put_entry(make_entry(place))
            leases.release(lease)


def replace_often(barrier: Any, number: int, url: str, rounds: int) -> None:
    """Write the same entry again and again, each time with outputs and ingredients that match."""
    index = MetadataIndex(url)
    barrier.wait()
    for place in range(rounds):
        content = number * rounds + place
        index.put_entry(
            make_entry(
                1, outputs={"out": make_artifact(content=content)}, ingredients={"content": content}
            )
        )
        (entry,) = index.find_entries([make_fingerprint(1)]).values()
        assert entry.outputs["out"] == make_artifact(content=entry.ingredients["content"])


def die_holding(_barrier: Any, _number: int, url: str, ttl: float) -> None:
    """Take a lease and be killed."""
    leases = Leases(MetadataIndex(url))
    assert not isinstance(leases.acquire(make_fingerprint(1), "the dead", ttl=ttl), Held)
    os.kill(os.getpid(), signal.SIGKILL)


def run_to_death(target: Callable[..., None], *args: Any) -> None:
    """Run ``target(None, 0, *args)`` in a process that has to be killed by itself."""
    process = SPAWN.Process(target=target, args=(None, 0, *args))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
