"""A container's log arrives whole and once, whatever happens to the connection."""

from __future__ import annotations

import struct
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines.compute.docker.logs import LogConnectionError, LogFollower
from airflow_mlpipelines.compute.log_position import LogEntry, LogPosition

STDOUT, STDERR = 1, 2
START = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


def timestamp(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


def frame(entry: LogEntry) -> bytes:
    payload = entry.time.encode() + b" " + entry.data
    return struct.pack(">BxxxL", entry.stream, len(payload)) + payload


class FakeLogServer:
    """A daemon that has one container's log, and cuts each connection where it is told to."""

    def __init__(self, entries: list[LogEntry], cuts: list[int]) -> None:
        self.requests: list[dict[str, list[str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                server.requests.append(query)
                since = int(query.get("since", ["0"])[0])
                body = b"".join(
                    frame(entry)
                    for entry in entries
                    if datetime.fromisoformat(entry.time).timestamp() >= since
                )
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: cuts.pop(0)] if cuts else body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"tcp://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeLogServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def read_log(entries: list[LogEntry], cuts: list[int]) -> tuple[list[str], FakeLogServer]:
    """Return the lines that a follower hands on, connecting anew after each cut."""
    from docker import APIClient

    lines: list[str] = []
    with FakeLogServer(entries, cuts) as server:
        client = APIClient(base_url=server.url, version="1.41")
        follower = LogFollower(client, "c", lines.append)
        for _ in range(len(cuts) + 1):
            with suppress(LogConnectionError):  # a cut may also look like the end of the log
                follower.read(follow=True)
        follower.finish()
        client.close()
    return lines, server


@pytest.mark.parametrize("cut", [0, 5, 30, 57, 100, 333])
def test_a_log_cut_anywhere_is_read_on_without_a_gap_or_a_repetition(cut: int) -> None:
    entries = [LogEntry(timestamp(i / 3), STDOUT, b"line %d\n" % i) for i in range(30)]
    lines, server = read_log(entries, [cut, cut + 400])
    assert lines == [f"line {i}" for i in range(30)]
    assert len(server.requests) == 3


def test_reading_on_asks_only_for_the_last_seconds() -> None:
    entries = [LogEntry(timestamp(i), STDOUT, b"line\n") for i in range(60)]
    _, server = read_log(entries, [len(frame(entries[0])) * 50])
    assert int(server.requests[1]["since"][0]) == int(START.timestamp()) + 48


def test_equal_lines_of_the_same_moment_are_all_kept() -> None:
    entries = [LogEntry(timestamp(1), STDOUT, b"same\n")] * 5
    lines, _ = read_log(entries, [len(frame(entries[0])) * 3])
    assert lines == ["same"] * 5


def test_entries_that_lie_in_the_wrong_order_are_all_kept() -> None:
    entries = [
        LogEntry(timestamp(1.9), STDOUT, b"first\n"),
        LogEntry(timestamp(2.1), STDOUT, b"second\n"),
        LogEntry(timestamp(1.8), STDERR, b"late\n"),
        LogEntry(timestamp(2.2), STDOUT, b"third\n"),
    ]
    lines, _ = read_log(entries, [len(frame(entries[0])) + len(frame(entries[1]))])
    assert lines == ["first", "second", "late", "third"]


@given(
    gaps=st.lists(st.integers(0, 900), min_size=1, max_size=40),
    streams=st.lists(st.sampled_from([STDOUT, STDERR]), min_size=40, max_size=40),
    cut=st.integers(0, 40),
)
def test_no_entry_is_lost_or_repeated_wherever_reading_stops(
    gaps: list[int], streams: list[int], cut: int
) -> None:
    times = [sum(gaps[: i + 1]) / 1000 for i in range(len(gaps))]
    entries = [
        LogEntry(timestamp(time), stream, b"%d" % i)
        for i, (time, stream) in enumerate(zip(times, streams, strict=False))
    ]
    position = LogPosition()
    got = [entry for entry in entries[:cut] if position.is_new(entry)]
    since = position.reopen() or 0
    again = [e for e in entries if datetime.fromisoformat(e.time).timestamp() >= since]
    got += [entry for entry in again if position.is_new(entry)]
    assert got == entries


def test_a_clock_set_back_loses_no_line() -> None:
    entries = [LogEntry(timestamp(time), STDOUT, b"x\n") for time in (7200, 7201, 7202, 5, 6)]
    position = LogPosition()
    assert all(position.is_new(entry) for entry in entries)
    assert position.reopen() == int(START.timestamp()) + 5


def test_lines_of_two_streams_do_not_mix() -> None:
    entries = [
        LogEntry(timestamp(1), STDERR, b"a long "),
        LogEntry(timestamp(1), STDOUT, b"short\n"),
        LogEntry(timestamp(2), STDERR, b"line\n"),
        LogEntry(timestamp(3), STDOUT, b"no line end"),
    ]
    lines, _ = read_log(entries, [])
    assert lines == ["short", "a long line", "no line end"]


def test_a_line_in_pieces_that_was_cut_between_them_stays_whole() -> None:
    entries = [
        LogEntry(timestamp(1), STDOUT, piece) for piece in (b"one ", b"line of ", b"three\n")
    ]
    for cut in range(sum(len(frame(entry)) for entry in entries)):
        lines, _ = read_log(entries, [cut])
        assert lines == ["one line of three"]


def test_a_daemon_that_refuses_the_log_is_told_apart_from_its_end() -> None:
    from docker import APIClient

    with FakeLogServer([], []) as server:
        url = server.url
    follower = LogFollower(APIClient(base_url=url, version="1.41"), "c", print)
    with pytest.raises(LogConnectionError):
        follower.read(follow=True)
