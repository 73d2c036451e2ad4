"""How quickly outputs go to an S3 store and come back as inputs, against rclone and ``aws s3 cp``.

The same trees, the same server on this machine (versitygw), each in a process of its own. Ours is the whole way:
digests are taken and checked, and data lie in the blob cache, linked to where a container's step reads them. It is timed
inside its process, as a step's process is there anyway. Where links won't do (a local compute), files are copied on the
disk after that, which is told apart.

Run: ``python tests/benchmarks/bench_transfer.py [--rounds 3] [--megabytes 1024] [--json]``; needs versitygw
(``.ci/versitygw.sh`` builds it), rclone and awscli.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from run import LEFT_OUT

from tests.integration.versitygw_server import S3_KEYS, find_versitygw, run_versitygw

LIMIT_RATIO = 0.7
LIMIT_MEGABYTES = 256
BUCKET = "bench"
TOUCH = """
import mmap
with mmap.mmap(-1, 2 << 30) as memory:
    for page in range(0, len(memory), mmap.PAGESIZE):
        memory[page] = 1
"""
OURS = """
import json, resource, subprocess, sys, time
from pathlib import Path
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import commit_output, fetch

way, credentials, tree, noted, place, touch = sys.argv[1:]
store = open_store("lake", "s3://bench/ours", credentials=json.loads(credentials))
store.exists("")
noted, place = Path(noted), Path(place)
subprocess.run([sys.executable, "-c", touch], check=True)
started = time.perf_counter()
copied = None
if way == "up":
    made = commit_output(store, Path(tree).name, Path(tree), step_run="r")
    seconds = time.perf_counter() - started
    noted.write_text(json.dumps(made.to_dict()))
else:
    artifact = Artifact.from_dict(json.loads(noted.read_text()))
    stores, blobs = StoreSet([store], "lake"), BlobCache(place / "blobs", limit=1 << 40)
    fetch(artifact, stores, blobs=blobs, target=place / "linked", link=True)
    seconds = time.perf_counter() - started
    fetch(artifact, stores, blobs=blobs, target=place / "copied")
    copied = time.perf_counter() - started
print(json.dumps([seconds, copied, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10]))
"""


def main() -> int:
    """Print the figures; return 1 if one misses its limit, :data:`LEFT_OUT` if nothing is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--tree", choices=("large", "small", "mixed"), help="only this one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    server = find_versitygw()
    missing = [name for name in ("rclone", "aws") if shutil.which(name) is None]
    if server is None or missing:
        print(f"left out: no {'versitygw' if server is None else ' and '.join(missing)}")
        return LEFT_OUT
    results = []
    with tempfile.TemporaryDirectory(prefix="mlpipelines-bench-") as folder:
        root = Path(folder)
        trees = make_trees(root / "trees", args.megabytes, args.files)
        (root / "served" / BUCKET).mkdir(parents=True)
        with run_versitygw(server, root / "served") as url:
            for tree in trees:
                if args.tree not in (None, tree.name):
                    continue
                found = measure_tree(root, tree, url, args.rounds)
                results += found
                for result in found:
                    print(json.dumps(result) if args.json else show(result), flush=True)
    good = [r["ratio"] >= r["limit"] and r["peak_mb"] <= LIMIT_MEGABYTES for r in results]
    return 0 if all(good) else 1


def make_trees(root: Path, megabytes: int, files: int) -> list[Path]:
    """Make one large file, many small ones, and both together; return the directories."""
    large, small, mixed = (root / name for name in ("large", "small", "mixed"))
    write_file(large / "one.bin", megabytes << 20)
    for number in range(files):
        write_file(small / f"{number // 300:02}" / f"{number}.bin", 4096)
    for number in range(files // 3):
        write_file(mixed / f"{number // 300:02}" / f"{number}.bin", 16384)
    for number in range(24):
        write_file(mixed / f"{number}.bin", megabytes << 20 >> 8)
    write_file(mixed / "one.bin", megabytes << 20 >> 2)
    return [large, small, mixed]


def write_file(path: Path, size: int) -> None:
    """Write a file of random bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - start)))


def measure_tree(root: Path, tree: Path, url: str, rounds: int) -> list[dict[str, object]]:
    """Return the figures of one tree, up and down: the quickest of each over all rounds.

    They take turns in being the first, what one has written is on the disk before the next begins, what is to be fetched
    is in the server's memory, and there is memory for what is written: a virtual machine gives back what it does not use
    after some seconds, and is slow to get it again.
    """
    programs = ("rclone", "aws", "ours")
    seconds: dict[tuple[str, str], list[float]] = {
        (name, way): [] for name in (*programs, "copied") for way in ("up", "down")
    }
    peaks: dict[str, list[int]] = {"up": [], "down": []}
    place = root / "place"
    for number in range(rounds):
        first = number % len(programs)
        for way in ("up", "down"):
            for name in programs[first:] + programs[:first]:
                os.sync()
                if way == "down":
                    read_all(root / "served" / BUCKET / name)
                if name == "ours":
                    told = run(our_command(way, tree, root, url), os.environ)[1]
                    taken, with_copy, peak = json.loads(told)
                    seconds["copied", way].append(with_copy or taken)
                    peaks[way].append(peak)
                else:
                    here, there = (str(tree), f"{name}/{tree.name}")
                    if way == "down":
                        here = str(place / name)
                    command = baseline(name, way, here, there, url)
                    touch_memory()
                    taken = run(command, environment(url))[0]
                seconds[name, way].append(taken)
        shutil.rmtree(place)
        for name in programs:
            shutil.rmtree(root / "served" / BUCKET / name)
    best = {key: min(times) for key, times in seconds.items()}
    size = sum(file.stat().st_size for file in tree.rglob("*") if file.is_file())
    files = sum(file.is_file() for file in tree.rglob("*"))
    return [
        {
            "benchmark": f"{tree.name}: {files} files, {size >> 20} MB, {way}",
            "baseline": "the quicker one of rclone and aws s3 cp",
            **{f"{name}_s": round(best[name, way], 2) for name in programs},
            "ratio": round(min(best["rclone", way], best["aws", way]) / best["ours", way], 2),
            "limit": LIMIT_RATIO,
            **({"ours_with_a_copy_s": round(best["copied", way], 2)} if way == "down" else {}),
            "peak_mb": max(peaks[way]),
            "limit_mb": LIMIT_MEGABYTES,
        }
        for way in ("up", "down")
    ]


def read_all(folder: Path) -> None:
    """Have the files of a folder in memory."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(8 << 20):
                    pass


def touch_memory() -> None:
    """Have the machine get memory that is free then: in another process, as this one's counts for what it starts."""
    subprocess.run([sys.executable, "-c", TOUCH], check=True)


def our_command(way: str, tree: Path, root: Path, url: str) -> list[str]:
    """Return the command that commits a tree as an output, or fetches it as an input."""
    client = {"endpoint_url": url, "region_name": "us-east-1"}
    credentials = {"key": S3_KEYS[0], "secret": S3_KEYS[1], "client_kwargs": client}
    words = [
        way,
        json.dumps(credentials),
        str(tree),
        str(root / "noted"),
        str(root / "place"),
        TOUCH,
    ]
    return [sys.executable, "-c", OURS, *words]


def baseline(name: str, way: str, here: str, there: str, url: str) -> list[str]:
    """Return the command of another program for the same."""
    if name == "aws":
        ends = [here, f"s3://{BUCKET}/{there}"]
        words = ["aws", "--endpoint-url", url, "s3", "cp", "--recursive", "--only-show-errors"]
    else:
        # versitygw does not answer "Expect: 100-continue", for which rclone would wait a second each time.
        ends = [here, f"bench:{BUCKET}/{there}"]
        words = ["rclone", "copy", "--transfers", "8", "--expect-continue-timeout", "0"]
    return [*words, *(ends if way == "up" else ends[::-1])]


def environment(url: str) -> dict[str, str]:
    """Return the variables with which the other programs find the server."""
    # rclone stops at AWS_CA_BUNDLE, and no certificate is asked for here.
    kept = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}
    return kept | {
        "AWS_ACCESS_KEY_ID": S3_KEYS[0],
        "AWS_SECRET_ACCESS_KEY": S3_KEYS[1],
        "AWS_DEFAULT_REGION": "us-east-1",
        "RCLONE_CONFIG": os.devnull,
        "RCLONE_CONFIG_BENCH_TYPE": "s3",
        "RCLONE_CONFIG_BENCH_PROVIDER": "Other",
        "RCLONE_CONFIG_BENCH_ENDPOINT": url,
        "RCLONE_CONFIG_BENCH_ENV_AUTH": "true",
    }


def run(command: list[str], variables: object) -> tuple[float, str]:
    """Return how long a command takes, and what it says."""
    started = time.perf_counter()
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return seconds, done.stdout.strip()


def show(result: dict[str, object]) -> str:
    """Return the figures for people."""
    return "\n".join(f"{key}: {value}" for key, value in result.items()) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
