"""Tables for people."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from airflow_mlpipelines._units import show_duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_COLOURS = {
    "reuse": "green",
    "reused": "green",
    "run": "yellow",
    "ran": "yellow",
    "later": "cyan",
    "ready": "green",
    "not built": "yellow",
    "not pulled": "yellow",
    "wrong": "red",
    "failed": "red",
    "skipped": "bright_black",
    "not_started": "bright_black",
}
_FILE_WIDTH = 160
"""Columns where the output is no terminal, but a file or a log of CI."""


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None
) -> None:
    """Print a table; words that say what happened to a step are coloured."""
    table = Table(*columns, title=title, title_justify="left", header_style="bold", box=None)
    for row in rows:
        table.add_row(*[_paint(cell) for cell in row])
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    console.print(table)


def _paint(cell: Any) -> str:
    from rich.markup import escape

    text = str(cell)
    colour = _COLOURS.get(text)
    return f"[{colour}]{text}[/]" if colour else escape(text)


def show_seconds(seconds: float | None) -> str:
    """Return a duration for people; nothing where there was none."""
    return show_duration(seconds) if seconds else ""
