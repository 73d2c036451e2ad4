"""Reading and writing tables, the same way in every script."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

TARGET = "late"
LATE_MINUTES = 15


def read(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table to Parquet; equal tables become equal bytes."""
    table.reset_index(drop=True).to_parquet(path, index=False, compression="zstd")
    print(f"{len(table):,} rows, {table.shape[1]} columns -> {path.name}")


def split(table: pd.DataFrame, test_month: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the months before the test month, and the test month."""
    return table[table["month"] < test_month], table[table["month"] == test_month]
