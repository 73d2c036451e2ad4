"""Keep the flights that took place, with types that fit."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
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

    flights = pd.read_csv(args.raw / "flights.csv", usecols=COLUMNS)
    landed = flights.dropna(subset=["arr_delay", "dep_delay", "tailnum"])
    print(f"{len(flights) - len(landed):,} of {len(flights):,} flights never landed")
    landed = landed.sort_values(
        ["month", "day", "sched_dep_time", "carrier", "tailnum"], kind="stable"
    )
    tables.write(landed, args.out)


if __name__ == "__main__":
    main()
