"""Durations and sizes for people."""

from __future__ import annotations

_MINUTE = 60
_UNIT = 1024


def show_duration(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> show_duration(4.24), show_duration(150)
        ('4.2 s', '2.5 min')
    """
    return f"{seconds:.1f} s" if seconds < 2 * _MINUTE else f"{seconds / _MINUTE:.1f} min"


def show_size(size: float) -> str:
    """Return a number of bytes for people.

    Example:
        >>> show_size(17), show_size(2048)
        ('17 B', '2.0 KiB')
    """
    if size < _UNIT:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= _UNIT
        if size < _UNIT:
            return f"{size:.1f} {unit}"
    return f"{size / _UNIT:.1f} TiB"
