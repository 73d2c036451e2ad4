"""Names: made unique, made safe as identifiers, and guessed when misspelt."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHOWN_OPTIONS = 12
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
DATA_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""What the names of data and parameters look like: they become environment variables."""


def make_unique(names: Iterable[str]) -> list[str]:
    """Return the names in their order, each later repetition with ``_2``, ``_3``, … appended.

    Adding a step at the end never renames an earlier one.

    Example:
        >>> make_unique(["train", "train", "report", "train"])
        ['train', 'train_2', 'report', 'train_3']
    """
    wanted = list(names)
    first_uses = set(wanted)
    taken: set[str] = set()
    unique = []
    for name in wanted:
        candidate, count = name, 1
        while candidate in taken or (count > 1 and candidate in first_uses):
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate)
        unique.append(candidate)
    return unique


def make_identifier(name: str) -> str:
    """Return ``name`` with all that an Airflow id can't hold replaced by ``_``; never empty.

    Example:
        >>> make_identifier("train model.py (v2)")
        'train_model.py_v2'
    """
    return _UNSAFE.sub("_", name).strip("_.-") or "unnamed"


def suggest(name: str, options: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the option nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def list_options(options: Iterable[str]) -> str:
    """Return the options as a bounded, sorted, bracketed list for an error message."""
    names = sorted(options)
    shown = ", ".join(repr(name) for name in names[:_SHOWN_OPTIONS])
    more = f", … {len(names) - _SHOWN_OPTIONS} more" if len(names) > _SHOWN_OPTIONS else ""
    return f"[{shown}{more}]"
