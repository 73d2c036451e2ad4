"""All benchmarks, one after the other; exit code 1 if a figure misses its limit. `make bench` runs this."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run every ``bench_*.py`` of this folder in a process of its own."""
    missed = []
    for script in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"== {script.name}", flush=True)
        if subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=False).returncode:
            missed.append(script.name)
    print(f"missed: {', '.join(missed)}" if missed else "all figures are within their limits")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
