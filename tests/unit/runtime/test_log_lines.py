from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines.runtime.log_lines import LONGEST_LINE, LineFolder


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fold(*chunks: bytes) -> list[str]:
    folder = LineFolder()
    lines = [line for chunk in chunks for line in folder.feed(chunk)]
    return lines + list(folder.finish())


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"a\nb\n"], ["a", "b"]),
        ([b"a", b"b\nc"], ["ab", "c"]),
        ([b"\n\n"], ["", ""]),
        ([b"a\r\nb\r\n"], ["a", "b"]),
        ([b"a\r", b"\nb"], ["a", "b"]),
        ([b"\r 1%\r 2%", b"\r 3%\n"], [" 3%"]),
        ([b"1%\r2%\r", b"3%\r\n"], ["3%"]),
        ([b"1%\r", b"2%\r"], ["2%"]),
        ([b"\xe2\x82", b"\xac\n"], ["€"]),
        ([b"\xff\n"], ["\ufffd"]),
    ],
)
def test_chunks_become_lines(chunks: list[bytes], lines: list[str]) -> None:
    assert fold(*chunks) == lines


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_where_the_chunks_are_cut_does_not_count(data: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[a:b] for a, b in pairwise(edges)]
    assert fold(*chunks) == fold(data)


def test_a_progress_bar_shows_up_every_ten_seconds() -> None:
    clock = Clock()
    folder = LineFolder(clock=clock)
    lines = []
    for second in range(25):
        clock.now = second
        lines += list(folder.feed(b"\r%d%%" % second))
    lines += list(folder.feed(b"\r100%\n"))
    assert lines == ["9%", "19%", "100%"]  # each the last one that was overwritten


def test_pieces_of_a_long_line_are_cut_between_characters() -> None:
    text = "a" + "€" * LONGEST_LINE
    pieces = fold(text.encode())
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= LONGEST_LINE


def test_a_large_log_takes_no_time() -> None:
    chunk = b"".join(
        b"line %d of a log of ordinary length, with a few words\n" % i for i in range(1000)
    )
    folder = LineFolder()
    started = time.process_time()
    count = sum(1 for _ in range(500) for _ in folder.feed(chunk))
    assert count == 500_000
    assert time.process_time() - started < 2
