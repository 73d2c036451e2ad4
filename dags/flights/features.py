"""What is known of a flight before it leaves: schedule, route, plane, weather."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import tables

FLIGHTS = [
    "month", "day", "hour", "sched_dep_time", "arr_delay", "dep_delay", "carrier", "tailnum",
    "origin", "dest", "air_time",
]  # fmt: skip
WEATHER = ["origin", "month", "day", "hour", "temp", "wind_speed", "precip", "visib"]
PLANES = ["tailnum", "year", "seats"]


def add_weather(flights: pd.DataFrame, weather: pd.DataFrame) -> pd.DataFrame:
    hourly = weather.drop_duplicates(["origin", "month", "day", "hour"])
    return flights.merge(hourly[WEATHER], on=["origin", "month", "day", "hour"], how="left")


def add_planes(flights: pd.DataFrame, planes: pd.DataFrame) -> pd.DataFrame:
    known = planes.rename(columns={"year": "built"})[["tailnum", "built", "seats"]]
    return flights.merge(known, on="tailnum", how="left")


def add_calendar(flights: pd.DataFrame) -> pd.DataFrame:
    dates = pd.to_datetime({"year": 2013, "month": flights["month"], "day": flights["day"]})
    return flights.assign(weekday=dates.dt.day_of_week, minute=flights["sched_dep_time"] % 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flights", type=Path, required=True)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    flights = add_calendar(tables.read(args.flights, FLIGHTS))
    flights = add_weather(flights, tables.read_csv(args.raw / "weather.csv", WEATHER))
    flights = add_planes(flights, tables.read_csv(args.raw / "planes.csv", PLANES))
    for column in ("carrier", "origin", "dest"):
        flights[column] = flights[column].astype("category").cat.codes
    flights[tables.TARGET] = flights["arr_delay"] > tables.LATE_MINUTES
    known_before = flights.drop(columns=["arr_delay", "dep_delay", "air_time", "tailnum"])
    tables.write(known_before, args.out)


if __name__ == "__main__":
    main()
