"""What importing the package costs: time against an empty Python start, and what it pulls in.

Run: ``python tests/benchmarks/bench_import.py [--json]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

HEAVY = ("airflow", "pydantic", "sqlalchemy", "fsspec", "docker", "kubernetes", "pandas")
LIMIT_MILLISECONDS = 100


def measure(code: str, rounds: int) -> list[float]:
    """Return the wall time in milliseconds of each run of ``python -c code``."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append((time.perf_counter() - started) * 1000)
    return times


def main() -> int:
    """Print the figures; return 1 if the package costs more than the limit or pulls in too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    measure("import airflow_mlpipelines", 2)  # the first ones fill the file cache
    empty = statistics.median(measure("pass", args.rounds))
    package = statistics.median(measure("import airflow_mlpipelines", args.rounds))
    probe = f"import sys, airflow_mlpipelines; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    pulled_in = done.stdout.strip()
    result = {
        "benchmark": "import airflow_mlpipelines",
        "baseline": "python -c pass",
        "baseline_ms": round(empty, 1),
        "package_ms": round(package, 1),
        "import_ms": round(package - empty, 1),
        "limit_ms": LIMIT_MILLISECONDS,
        "heavy_modules": pulled_in,
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0 if package - empty < LIMIT_MILLISECONDS and pulled_in == "[]" else 1


if __name__ == "__main__":
    raise SystemExit(main())
