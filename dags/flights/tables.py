"""Reading and writing tables, the same way in every script."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pandas as pd

TARGET = "late"
LATE_MINUTES = 15


def read(path: Path, columns: Collection[str] = ()) -> pd.DataFrame:
    """Return the table of a Parquet file, which has to have these columns, or end with what is wrong."""
    return _check(pd.read_parquet, path, columns)


def read_csv(path: Path, columns: Collection[str]) -> pd.DataFrame:
    """Return these columns of a CSV file, or end with what is wrong."""
    return _check(
        lambda file: pd.read_csv(file, usecols=lambda name: name in columns), path, columns
    )


def _check(
    reader: Callable[[Path], pd.DataFrame], path: Path, columns: Collection[str]
) -> pd.DataFrame:
    try:
        table = reader(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} can't be read: {error}") from None
    lacking = [name for name in columns if name not in table.columns]
    if lacking:
        raise SystemExit(f"{path} lacks the columns {lacking}")
    if table.empty:
        raise SystemExit(f"{path} has no rows")
    return table


def check_both(table: pd.DataFrame, what: str) -> None:
    """End unless there are late and punctual flights: else nothing can be learned or scored."""
    if table[TARGET].nunique() < 2:
        raise SystemExit(
            f"of {len(table):,} flights {what}, not both late and punctual ones are there"
        )


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table to Parquet; equal tables become equal bytes."""
    table.reset_index(drop=True).to_parquet(path, index=False, compression="zstd")
    print(f"{len(table):,} rows, {table.shape[1]} columns -> {path.name}")


def split(table: pd.DataFrame, test_month: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the months before the test month, and the test month."""
    return table[table["month"] < test_month], table[table["month"] == test_month]
