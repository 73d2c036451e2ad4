"""One build at a time over machines that share nothing but the metadata database."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.execution import build_leases, heartbeat
from airflow_mlpipelines.execution.build_leases import make_build_guard
from tests.integration.postgres_server import run_postgres
from tests.unit.caching.index_contract import forget_engines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "0" * 64
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a metadata database with its tables."""
    if request.param == "sqlite":
        MetadataIndex(made := f"sqlite:///{tmp_path}/metadata.db").get_contents(["0"])
        forget_engines()
        yield made
        return
    pytest.importorskip("psycopg2")
    with run_postgres() as server:
        MetadataIndex(made := server % "postgres").get_contents(["0"])
        forget_engines()  # a process that is forked may not have its parent's connections
        yield made
        forget_engines()


def work(url: str, machine: str, seconds: float, told: Any) -> None:
    """Build for some seconds, and tell when that began and ended, and what was waited for."""
    lines: list[str] = []
    guard = make_build_guard(MetadataIndex(url), machine)
    with guard(KEY, "mlpipelines/env:x", emit=lines.append):
        began = time.time()
        told.put((machine, "began"))
        time.sleep(seconds)
        ended = time.time()
    told.put((began, ended, lines))


def test_machines_build_one_after_the_other_and_say_whom_they_wait_for(url: str) -> None:
    told: Any = FORK.Queue()
    machines = [
        FORK.Process(target=work, args=(url, f"machine {number}", 1.5, told)) for number in range(3)
    ]
    for machine in machines:
        machine.start()
    try:
        said = [told.get(timeout=60) for _ in range(6)]
    finally:
        for machine in machines:
            machine.kill()
            machine.join()
    spans = sorted(item for item in said if len(item) == 3)
    for (_, ended, _), (began, _, _) in itertools.pairwise(spans):
        assert ended <= began
    assert spans[0][2] == []
    for _, _, lines in spans[1:]:
        assert all(line.startswith("Waiting for machine ") for line in lines)
        assert lines[0].endswith(", which is building mlpipelines/env:x")
        assert len(lines) == len(set(lines))


def test_a_machine_that_was_lost_is_waited_for_until_its_lease_has_run_out(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(heartbeat, "_RENEW_SECONDS", 0.5)
    monkeypatch.setattr(build_leases, "_LOOK_SECONDS", 0.2)
    told: Any = FORK.Queue()
    lost = FORK.Process(target=work, args=(url, "a lost machine", 600, told))
    lost.start()
    try:
        assert told.get(timeout=60) == ("a lost machine", "began")
        time.sleep(4)  # longer than the lease: it is renewed while the machine lives
        waiting = FORK.Process(target=work, args=(url, "another machine", 0, told))
        waiting.start()
        time.sleep(1)
        assert told.empty()
        lost.kill()
        assert told.get(timeout=60) == ("another machine", "began")
        _, _, lines = told.get(timeout=60)
        assert lines == ["Waiting for a lost machine, which is building mlpipelines/env:x"]
        waiting.join(timeout=30)
    finally:
        lost.kill()
        lost.join()
