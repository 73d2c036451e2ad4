"""When a transfer over connections that break is given up, and when it is not."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.kubernetes import reconnecting
from airflow_mlpipelines.compute.kubernetes.channel import ChannelError, CommandError
from airflow_mlpipelines.compute.kubernetes.cluster import FORBIDDEN, PodUnreachableError
from airflow_mlpipelines.compute.kubernetes.reconnecting import Progress, see_through

if TYPE_CHECKING:
    from collections.abc import Callable

MINUTES = 60.0


class Clock:
    """A clock that goes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Cluster:
    """A cluster that answers."""

    def __init__(self, state: str | None = "running") -> None:
        self._state = state

    def find_patiently(self, *_: Any, **__: Any) -> tuple[Any, bool]:
        if self._state is None:
            return None, False
        status = {"name": "outputs", "state": {self._state: {}}}
        return {"metadata": {}, "status": {"containerStatuses": [status]}}, False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(reconnecting, "time", made)
    return made


def carry(action: Callable[[Progress], None], cluster: Cluster | None = None) -> None:
    progress = Progress()
    see_through(
        cluster or Cluster(),  # type: ignore[arg-type]
        "pod",
        "outputs",
        lambda: action(progress),
        progress,
        lambda _pod: False,
    )


def test_an_agent_that_is_at_work_outlasts_any_number_of_connections(clock: Clock) -> None:
    connections = itertools.count(1)

    def commit(progress: Progress) -> None:
        clock.sleep(5 * MINUTES)  # what a load balancer lets a connection live
        progress.touch()
        if next(connections) < 100:
            raise ChannelError("the connection broke")

    carry(commit)
    assert clock.now > 100 * 5 * MINUTES


def test_an_archive_that_breaks_at_the_same_place_each_time_is_given_up(clock: Clock) -> None:
    def fetch(progress: Progress) -> None:
        for received in range(5):
            clock.sleep(MINUTES)
            progress.note("outputs", received)
        raise ChannelError("the connection broke")

    with pytest.raises(PodUnreachableError, match=r"for 10.0 min, nothing got through to .*'pod'"):
        carry(fetch)
    assert clock.now < 30 * MINUTES


def test_what_was_done_over_an_earlier_connection_is_not_done_again(clock: Clock) -> None:
    done: list[str] = []

    def fetch(progress: Progress) -> None:
        progress.once("outputs", lambda: done.append("outputs"))
        done.append("run")
        if done.count("run") < 3:
            raise ChannelError("the connection broke")

    carry(fetch)
    assert done == ["outputs", "run", "run", "run"]


def test_a_command_that_fails_is_not_repeated_for_ten_minutes(clock: Clock) -> None:
    def fail(_: Progress) -> None:
        raise CommandError("exit code 2")

    with pytest.raises(CommandError, match="exit code 2"):
        carry(fail)
    assert clock.now < MINUTES


@pytest.mark.parametrize("state", [None, "terminated"])
def test_what_is_gone_is_not_waited_for(clock: Clock, state: str | None) -> None:
    def fail(_: Progress) -> None:
        raise ChannelError("no connection")

    with pytest.raises(CommandError, match=r"(is gone|has ended)\. no connection"):
        carry(fail, Cluster(state))
    assert clock.now == 0


def test_what_is_forbidden_is_not_waited_for(clock: Clock) -> None:
    def fail(_: Progress) -> None:
        raise ChannelError("cannot create resource pods/exec", status=FORBIDDEN)

    with pytest.raises(ChannelError, match="cannot create"):
        carry(fail)
    assert clock.now == 0
