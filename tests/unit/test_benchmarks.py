"""What `make bench` says at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.run import LEFT_OUT, run_all

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("codes", "said", "code"),
    [
        ({"a": 0, "b": 0}, ["all figures are within their limits"], 0),
        (
            {"a": 0, "b": LEFT_OUT},
            ["is not here: bench_b.py", "all figures that were taken are within their limits"],
            0,
        ),
        ({"a": LEFT_OUT, "b": LEFT_OUT}, ["bench_a.py, bench_b.py", "nothing was measured"], 0),
        ({"a": 1, "b": LEFT_OUT, "c": 0}, ["is not here: bench_b.py", "missed: bench_a.py"], 1),
        ({"a": -9, "b": 0}, ["missed: bench_a.py"], 1),
    ],
)
def test_what_was_left_out_is_told_from_what_was_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], codes, said, code
) -> None:
    for name, each in codes.items():
        end = "os.kill(os.getpid(), 9)" if each < 0 else f"sys.exit({each})"
        (tmp_path / f"bench_{name}.py").write_text(f"import os, sys\n{end}\n")

    assert run_all(tmp_path, []) == code

    lines = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("==")]
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert line.endswith(part)
