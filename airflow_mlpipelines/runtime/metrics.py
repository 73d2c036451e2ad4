"""Metrics on their way from a step's program to the worker: numbered JSON lines in ``metrics.jsonl``.

A line is written whole under two locks, so that threads, forked processes and unrelated processes of
one step may log at the same time: the file's, which is the process's alone and never inherited by a
fork (``flock`` would be, and then never be released), and one between the process's own threads, which
a fork makes anew. Lines are numbered from 1 on; a reader can tell that none is missing.

Numbers that JSON does not have (NaN, infinities) are written as text.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    StrPath = str | os.PathLike[str]

METRICS_FILE = "metrics.jsonl"
FORMAT_VERSION = 1
SCALAR, LIST, ROW, TABLE, IMAGE = "scalar", "list", "row", "table", "image"
STEP_RUN, PARENT_RUN = "step", "parent"
_BLOCK = 8192
_LARGEST_READ = 64 << 20
_threads = threading.Lock()


def _renew_lock() -> None:
    global _threads  # noqa: PLW0603 - the thread that held it at the fork is not in this process
    _threads = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def to_json_value(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: numbers of NumPy and tensors as numbers, else as text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _name_of(value)
    if isinstance(value, dict):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [to_json_value(item) for item in value]
    for convert in (
        "item",
        "tolist",
    ):  # NumPy, pandas, PyTorch, TensorFlow; none of them imported here
        method = getattr(value, convert, None)
        if method is not None:
            try:
                plain = method()
            except (TypeError, ValueError, RuntimeError):  # more than one item
                continue
            return to_json_value(plain) if type(plain) is not type(value) else str(value)
    return str(value)


def _name_of(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def append_metric(
    directory: StrPath, kind: str, name: str, value: Any, *, run: str = STEP_RUN, **extra: Any
) -> None:
    """Append one line to the metrics of a run directory; what it says is on the disk's way when it returns.

    Args:
        directory: The run directory.
        kind: One of :data:`SCALAR`, :data:`LIST`, :data:`ROW`, :data:`TABLE`, :data:`IMAGE`.
        name: The metric's name.
        value: Its value, of a form that fits its kind.
        run: Whose metric it is: :data:`STEP_RUN` or :data:`PARENT_RUN`.
        extra: ``description``, ``step``; left out where None.
    """
    record = {"v": FORMAT_VERSION, "time": round(time.time(), 6), "kind": kind, "name": name}
    if run != STEP_RUN:
        record["run"] = run
    record.update({key: item for key, item in extra.items() if item is not None})
    record["value"] = to_json_value(value)
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    path = os.path.join(os.fspath(directory), METRICS_FILE)  # noqa: PTH118
    with _threads:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(file)
            last, whole = _last_number(file)
            line = f'{"" if whole else chr(10)}{{"n": {last + 1}, {text[1:]}\n'
            data = line.encode("utf-8", "replace")
            while data:  # a short write happens where the disk is full, and then raises next
                data = data[os.write(file, data) :]
        finally:
            os.close(file)  # which lets go of the lock


def _lock(file: int) -> None:
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: lines stay whole, numbers may repeat
        return


def _last_number(file: int) -> tuple[int, bool]:
    """Return the number of the file's last line, and whether that line is whole."""
    end = os.lseek(file, 0, os.SEEK_END)
    if end == 0:
        return 0, True
    tail = b""
    start = end
    while start > 0 and tail.rstrip(b"\n").count(b"\n") < 1:
        start = max(0, start - _BLOCK)
        os.lseek(file, start, os.SEEK_SET)
        tail = os.read(file, end - start)
    whole = tail.endswith(b"\n")
    for line in reversed(tail.rstrip(b"\n").split(b"\n")):
        record = _parse(line)
        if record is not None:
            return int(record["n"]), whole
    return tail.count(b"\n"), whole  # nothing readable at the end; numbers go on without it


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("v") != FORMAT_VERSION:
        return None
    if not isinstance(record.get("n"), int) or not isinstance(record.get("name"), str):
        return None
    return record if _fits(record.get("kind"), record.get("value")) else None


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a value has the form that its kind demands; the program wrote both."""
    if kind == LIST:
        return isinstance(value, list)
    if kind == TABLE:
        return isinstance(value, dict) and all(isinstance(item, list) for item in value.values())
    return isinstance(value, dict) if kind == ROW else kind in (SCALAR, IMAGE)


class MetricsReader:
    """Reads the metrics of a run directory while they are being written, each line once.

    What is read was written by the step's program: lines that are none of ours are left out, links
    are not followed.
    """

    def __init__(self, directory: StrPath) -> None:
        self._path = os.path.join(os.fspath(directory), METRICS_FILE)  # noqa: PTH118
        self._offset = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Return the records of the lines that were completed since the last call, of 64 MiB at most."""
        with _threads:  # closing the file in one thread takes the lock away from another
            try:
                data = _read_from(self._path, self._offset)
            except OSError:  # not written yet, or no file that could be ours
                return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [record for record in map(_parse, complete.splitlines()) if record is not None]


def _read_from(path: str, offset: int) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.lseek(file, offset, os.SEEK_SET)
        chunks = []
        missing = _LARGEST_READ
        while missing > 0:
            chunk = os.read(file, min(missing, 1 << 20))
            if not chunk:
                break
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(file)


def read_metrics(directory: StrPath, *, run: str = STEP_RUN) -> dict[str, Any]:
    """Return the metrics of a run directory by name, as :func:`collect_metrics` puts them together."""
    return collect_metrics(MetricsReader(directory).read_new(), run=run)


def collect_metrics(records: Iterable[dict[str, Any]], *, run: str = STEP_RUN) -> dict[str, Any]:
    """Return each metric's name and value, in Azure ML's form.

    A number logged once is that number, logged repeatedly it is the list of them. Lists are strung
    together. Rows and tables become columns: ``{"x": [1, 2], "y": [3, 4]}``; of a single row, plain
    values.

    Args:
        records: The records, in their order.
        run: Whose metrics: :data:`STEP_RUN` or :data:`PARENT_RUN`.
    """
    grouped: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("run", STEP_RUN) == run:
            grouped.setdefault(record["name"], []).append(record)
    return {name: _together(group) for name, group in grouped.items()}


def _together(group: list[dict[str, Any]]) -> Any:
    kind = group[-1]["kind"]  # logged in two ways under one name: the last way counts
    values = [record["value"] for record in group if record["kind"] == kind]
    if kind == LIST:
        return [item for value in values for item in value]
    if kind in (ROW, TABLE):
        if len(values) == 1:
            return values[0]
        columns: dict[str, list[Any]] = {}
        for value in values:
            for column, item in value.items():
                columns.setdefault(column, []).extend(item if kind == TABLE else [item])
        return columns
    return values[0] if len(values) == 1 else values
