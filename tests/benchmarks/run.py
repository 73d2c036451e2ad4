"""All benchmarks, one after the other; exit code 1 if a figure misses its limit. `make bench` runs this.

A benchmark that lacks what it needs here, such as a cluster, is left out, and told of at the end.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEFT_OUT = 77
"""The exit code of a benchmark that could measure nothing, as automake has it for tests."""


def run_all(folder: Path, arguments: Sequence[str]) -> int:
    """Run every ``bench_*.py`` of the folder in a process of its own; return 1 if one misses a limit."""
    codes: dict[str, int] = {}
    for script in sorted(folder.glob("bench_*.py")):
        print(f"== {script.name}", flush=True)
        done = subprocess.run([sys.executable, str(script), *arguments], check=False)
        codes[script.name] = done.returncode
    left_out = [name for name, code in codes.items() if code == LEFT_OUT]
    missed = [name for name, code in codes.items() if code not in (0, LEFT_OUT)]
    if left_out:
        print(f"left out, as something that they need is not here: {', '.join(left_out)}")
    if missed:
        print(f"missed: {', '.join(missed)}")
    elif len(left_out) < len(codes):
        print(f"all figures{' that were taken' if left_out else ''} are within their limits")
    else:
        print("nothing was measured")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(run_all(Path(__file__).parent, sys.argv[1:]))
