"""Tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_COLOURS = {
    "reuse": "green",
    "reused": "green",
    "run": "yellow",
    "ran": "yellow",
    "later": "cyan",
    "failed": "red",
    "skipped": "bright_black",
    "not_started": "bright_black",
}


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None
) -> None:
    """Print a table; words that say what happened to a step are coloured."""
    table = Table(*columns, title=title, title_justify="left", header_style="bold", box=None)
    for row in rows:
        table.add_row(*[_paint(cell) for cell in row])
    Console().print(table)


def _paint(cell: Any) -> str:
    from rich.markup import escape

    text = str(cell)
    colour = _COLOURS.get(text)
    return f"[{colour}]{text}[/]" if colour else escape(text)


def show_seconds(seconds: float | None) -> str:
    """Return a duration for people."""
    if not seconds:
        return ""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def show_size(size: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"
