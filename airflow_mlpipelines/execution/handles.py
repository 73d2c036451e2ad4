"""Notes of what was launched, kept beside the work so that the next try on this machine finds them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class FileHandle:
    """What was launched, in a file on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self) -> dict[str, Any] | None:
        """Return what an earlier try launched, or None."""
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # never written, or half-written by a lost worker
            return None
        return data if isinstance(data, dict) else None

    def set(self, handle: dict[str, Any] | None) -> None:
        """Remember what was launched, or forget it."""
        if handle is None:
            self._path.unlink(missing_ok=True)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(handle), encoding="utf-8")
        temporary.replace(self._path)
