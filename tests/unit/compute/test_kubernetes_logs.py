"""The log of a pod's step, across connections that break anywhere."""

from __future__ import annotations

import io
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
from airflow_mlpipelines.compute.kubernetes.logs import AscendingTimes, LogFollower

if TYPE_CHECKING:
    from collections.abc import Iterator

START = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
START_AND_A_SECOND = "2026-01-31T12:00:01+00:00"


class Kubelet:
    """Answers as a kubelet does: a time before every line, from a whole second on; breaks off when told."""

    def __init__(self, lines: list[tuple[float, bytes]], breaks: list[int]) -> None:
        self.lines = [
            ((START + timedelta(seconds=at)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), text)
            for at, text in lines
        ]
        self.breaks = list(breaks)

    @contextmanager
    def open(self, path: str, *, query: dict[str, Any], seconds: float) -> Iterator[Any]:
        del path, seconds
        since = str(query.get("sinceTime", "")).rstrip("Z")
        kept = [(time, text) for time, text in self.lines if time >= since]
        data = b"".join(time.encode() + b" " + text + b"\n" for time, text in kept)
        if not self.breaks:
            yield io.BytesIO(data)
            return
        stream = _Breaking(data[: self.breaks.pop(0)])
        yield stream


class _Breaking(io.BytesIO):
    def read1(self, size: int | None = -1, /) -> bytes:
        data = super().read1(size)
        if not data:
            raise ClusterError(0, "the connection broke")
        return data


def follow(kubelet: Kubelet) -> list[str]:
    lines: list[str] = []
    follower = LogFollower(kubelet, "pod", lines.append)  # type: ignore[arg-type]
    while True:
        try:
            follower.read(follow=True)
        except ClusterError:
            continue
        follower.finish()
        return lines


@given(
    steps=st.lists(
        st.tuples(st.sampled_from([0.0, 0.0, 0.1, 0.9, 3.0]), st.integers(0, 40)), max_size=30
    ),
    breaks=st.lists(st.integers(0, 2500), max_size=6),
)
def test_every_line_arrives_once_wherever_the_connection_breaks(
    steps: list[tuple[float, int]], breaks: list[int]
) -> None:
    at, lines = 0.0, []
    for number, (pause, length) in enumerate(steps):
        at += pause
        lines.append((at, f"line {number} {'x' * length} end".encode()))
    assert follow(Kubelet(lines, breaks)) == [text.decode() for _, text in lines]


def test_a_line_that_breaks_in_the_middle_is_read_on() -> None:
    kubelet = Kubelet([(0, b"first"), (0, b"a" * 200_000), (0, b"last")], [100_000, 150_000, 30])
    lines = follow(kubelet)
    assert lines[0] == "first"
    assert "".join(lines[1:-1]) == "a" * 200_000
    assert lines[-1] == "last"


def test_what_the_kubelet_says_itself_is_no_line_of_the_step() -> None:
    kubelet = Kubelet([(0, b"first")], [])
    kubelet.lines.append(("rpc", b'error: code = NotFound desc = "container"'))
    assert follow(kubelet) == ["first"]


def test_lines_of_a_trigger_come_after_those_of_its_worker_and_keep_their_order() -> None:
    times = ["00.9", "01.123456789", "01.123456999", "01.1", "07.0"]
    given = [(f"2026-01-31T12:00:{time}Z", "the same") for time in times]

    def hand_on() -> list[tuple[str, str]]:
        lines: list[tuple[str, str]] = []
        ascending = AscendingTimes(lambda *line: lines.append(line), after=START_AND_A_SECOND)
        for time, line in given:
            ascending(time, line)
        return lines

    once = hand_on()
    assert [time for time, _ in once] == [
        "2026-01-31T12:00:01.000001+00:00",
        "2026-01-31T12:00:01.123456+00:00",
        "2026-01-31T12:00:01.123457+00:00",
        "2026-01-31T12:00:01.123458+00:00",
        "2026-01-31T12:00:07+00:00",
    ]
    assert hand_on() == once  # whoever reads a log from all its files tells lines by their times
