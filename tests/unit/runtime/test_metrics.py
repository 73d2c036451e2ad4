from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from airflow_mlpipelines.runtime.metrics import (
    LIST,
    METRICS_FILE,
    PARENT_RUN,
    ROW,
    SCALAR,
    TABLE,
    MetricsReader,
    append_metric,
    read_metrics,
    to_json_value,
)


def numbers(directory: Path) -> list[int]:
    return [json.loads(line)["n"] for line in (directory / METRICS_FILE).read_text().splitlines()]


def test_lines_are_numbered_from_one(tmp_path: Path) -> None:
    for value in range(3):
        append_metric(tmp_path, SCALAR, "loss", value, step=value)
    assert numbers(tmp_path) == [1, 2, 3]
    assert read_metrics(tmp_path) == {"loss": [0, 1, 2]}


def test_threads_and_forks_lose_and_repeat_no_number(tmp_path: Path) -> None:
    def log_some() -> None:
        for value in range(50):
            append_metric(tmp_path, LIST, "values", [value] * 500)

    threads = [threading.Thread(target=log_some) for _ in range(3)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(3):
        child = os.fork()  # in the middle of the threads' writing
        if child == 0:
            signal.alarm(20)  # should it wait for a lock that nobody holds any more
            try:
                log_some()
            finally:
                os._exit(0)
        children.append(child)
    for thread in threads:
        thread.join()
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert numbers(tmp_path) == list(range(1, 301))


def test_a_large_line_is_found_again(tmp_path: Path) -> None:
    append_metric(tmp_path, LIST, "long", list(range(20_000)))
    append_metric(tmp_path, SCALAR, "a", 1)
    assert numbers(tmp_path) == [1, 2]


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    append_metric(tmp_path, SCALAR, "a", 1)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"n": 2, "v": 1, "kind": "sca')
    append_metric(tmp_path, SCALAR, "b", 2)
    assert read_metrics(tmp_path) == {"a": 1, "b": 2}


def test_metrics_have_azure_mls_form(tmp_path: Path) -> None:
    append_metric(tmp_path, SCALAR, "once", 0.5)
    append_metric(tmp_path, LIST, "list", [1, 2])
    append_metric(tmp_path, LIST, "list", [3])
    append_metric(tmp_path, ROW, "row", {"x": 1, "y": "a"})
    append_metric(tmp_path, ROW, "rows", {"x": 1, "y": 2})
    append_metric(tmp_path, ROW, "rows", {"x": 3, "y": 4})
    append_metric(tmp_path, TABLE, "table", {"x": [1, 2]})
    append_metric(tmp_path, TABLE, "table", {"x": [3]})
    append_metric(tmp_path, SCALAR, "once", 0.9, run=PARENT_RUN)
    assert read_metrics(tmp_path) == {
        "once": 0.5,
        "list": [1, 2, 3],
        "row": {"x": 1, "y": "a"},
        "rows": {"x": [1, 3], "y": [2, 4]},
        "table": {"x": [1, 2, 3]},
    }
    assert read_metrics(tmp_path, run=PARENT_RUN) == {"once": 0.9}


def test_a_reader_hands_out_each_complete_line_once(tmp_path: Path) -> None:
    reader = MetricsReader(tmp_path)
    assert reader.read_new() == []
    append_metric(tmp_path, SCALAR, "a", 1)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"n": 2, "v": 1, "kind": "scalar", ')
        file.flush()
        assert [record["name"] for record in reader.read_new()] == ["a"]
        assert reader.read_new() == []
        file.write('"name": "b", "value": 2}\n')
    assert [record["name"] for record in reader.read_new()] == ["b"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "no json",
        "[1]",
        '{"n": 1}',
        '{"n": 1, "v": 2, "kind": "scalar", "name": "a", "value": 1}',
        '{"n": "1", "v": 1, "kind": "scalar", "name": "a", "value": 1}',
        '{"n": 1, "v": 1, "kind": "row", "name": "a", "value": [1]}',
        '{"n": 1, "v": 1, "kind": "table", "name": "a", "value": {"x": 1}}',
        '{"n": 1, "v": 1, "kind": "list", "name": "a", "value": "abc"}',
        '{"n": 1, "v": 1, "kind": "unknown", "name": "a", "value": 1}',
        '{"n": 1, "v": 1, "kind": "scalar", "name": ["a"], "value": 1}',
        "[" * 100_000,
    ],
)
def test_what_a_program_writes_there_by_itself_is_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS_FILE).write_text(f"{line}\n")
    append_metric(tmp_path, SCALAR, "own", 1)
    assert read_metrics(tmp_path) == {"own": 1}


def test_a_link_is_not_followed_and_a_pipe_not_waited_for(tmp_path: Path) -> None:
    append_metric(tmp_path, SCALAR, "a", 1)
    for name in ("linked", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / METRICS_FILE).symlink_to(tmp_path / METRICS_FILE)
    os.mkfifo(tmp_path / "pipe" / METRICS_FILE)
    assert read_metrics(tmp_path / "linked") == {}
    assert read_metrics(tmp_path / "pipe") == {}


class Scalar:
    """As NumPy's and PyTorch's."""

    def item(self) -> float:
        return 0.25


class Array:
    def item(self) -> float:
        raise ValueError("more than one item")

    def tolist(self) -> list[float]:
        return [1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.5, 0.5),
        (float("nan"), "NaN"),
        (float("-inf"), "-Infinity"),
        ("text", "text"),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        (Scalar(), 0.25),
        (Array(), [1.0, 2.0]),
        (Path("/a"), "/a"),
    ],
)
def test_any_value_becomes_json(value: Any, plain: Any) -> None:
    assert to_json_value(value) == plain
    json.dumps(to_json_value(value), allow_nan=False)


def test_values_of_numpy_become_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert to_json_value(numpy.float32(0.5)) == 0.5
    assert to_json_value(numpy.int64(7)) == 7
    assert to_json_value(numpy.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert to_json_value(numpy.float64("nan")) == "NaN"
