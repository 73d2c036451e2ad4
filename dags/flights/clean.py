"""Keep the flights that took place, with types that fit."""

from __future__ import annotations

import argparse
from pathlib import Path

import tables

COLUMNS = [
    "month", "day", "hour", "sched_dep_time", "arr_delay", "dep_delay", "carrier", "tailnum",
    "origin", "dest", "distance", "air_time",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    flights = tables.read_csv(args.raw / "flights.csv", COLUMNS)
    landed = flights.dropna(subset=["arr_delay", "dep_delay", "tailnum"])
    if landed.empty:
        raise SystemExit(f"none of the {len(flights):,} flights has landed")
    print(f"{len(flights) - len(landed):,} of {len(flights):,} flights never landed")
    landed = landed.sort_values(
        ["month", "day", "sched_dep_time", "carrier", "tailnum"], kind="stable"
    )
    tables.write(landed, args.out)


if __name__ == "__main__":
    main()
