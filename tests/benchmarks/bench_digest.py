"""How quickly data are digested.

One large file against the blake3 library reading the same file; and 100,000 small files, unchanged, against
the first time.

Run: ``python tests/benchmarks/bench_digest.py [--megabytes 2048] [--files 100000] [--json]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from airflow_mlpipelines.storage import stat_cache
from airflow_mlpipelines.storage.stat_cache import StatCache
from airflow_mlpipelines.storage.trees import digest_tree

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_THROUGHPUT = 0.8
LIMIT_AGAIN = 10.0
_PER_DIRECTORY = 500


def main() -> int:
    """Print the figures; return 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlpipelines-bench-") as folder:
        results = [
            measure_large_file(Path(folder), args.megabytes, args.rounds),
            measure_small_files(Path(folder), args.files),
        ]
    for result in results:
        print(json.dumps(result) if args.json else _show(result), flush=True)
    return 0 if all(result["ratio"] >= result["limit"] for result in results) else 1


def measure_large_file(folder: Path, megabytes: int, rounds: int) -> dict[str, object]:
    """Return our throughput against the library's, on a file that the page cache holds."""
    path = folder / "large.bin"
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for number in range(megabytes):
            file.write(number.to_bytes(8, "big") + block[8:])

    def library() -> None:
        blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()

    pairs = [(seconds(library), seconds(lambda: digest_tree(path))) for _ in range(rounds + 1)][1:]
    theirs, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    path.unlink()
    return {
        "benchmark": f"digest of one file of {megabytes} MB",
        "baseline": "the blake3 library reading the same file",
        "baseline_mb_s": round(megabytes / theirs),
        "ours_mb_s": round(megabytes / ours),
        "ratio": round(theirs / ours, 2),
        "limit": LIMIT_THROUGHPUT,
    }


def measure_small_files(folder: Path, files: int) -> dict[str, object]:
    """Return how much quicker the second digest of a tree is, in a new process' eyes."""
    root = folder / "small"
    for number in range(files):
        directory = root / f"{number // _PER_DIRECTORY:04}"
        if number % _PER_DIRECTORY == 0:
            directory.mkdir(parents=True)
        (directory / f"{number}.txt").write_bytes(b"%d" % number * 100)
    # Files as young as these are not trusted; a person would not digest them within two seconds.
    stat_cache._FRESH_NANOSECONDS = 0
    database = folder / "cache.db"
    first = seconds(lambda: digest_tree(root, cache=StatCache(database)))
    again = statistics.median(
        seconds(lambda: digest_tree(root, cache=StatCache(database))) for _ in range(3)
    )
    return {
        "benchmark": f"digest of {files} unchanged small files, again",
        "baseline": "the first time",
        "baseline_s": round(first, 2),
        "again_s": round(again, 2),
        "ratio": round(first / again, 1),
        "limit": LIMIT_AGAIN,
    }


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _show(result: dict[str, object]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in result.items()) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
