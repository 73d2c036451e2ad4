"""Programs that have ended well, and whose outputs are still to be sent: the next try only sends them."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from pathlib import Path

_NOTE = "finished.json"
_KEPT_SECONDS = 7 * 24 * 3600.0
"""How long what nobody came back for stays on the worker's disk: a try that comes later makes it anew."""


@dataclass
class FinishedProgram:
    """The end of a step run's program, noted in its workplace.

    Attributes:
        root: The workplace's directory.
        fingerprint: What the program was: a step of another one finds nothing here.
        metrics: What it logged.
        committed: Its outputs that are where they stay.
    """

    root: Path
    fingerprint: str
    metrics: dict[str, Any] = field(default_factory=dict)
    committed: dict[str, Artifact] = field(default_factory=dict)

    @classmethod
    def find(cls, root: Path, fingerprint: str) -> FinishedProgram | None:
        """Return what an earlier try has noted there of the same program, or None."""
        try:
            noted = json.loads((root / _NOTE).read_text(encoding="utf-8"))
            if noted["fingerprint"] != fingerprint:
                return None
            committed = {
                name: Artifact.from_dict(data) for name, data in noted["committed"].items()
            }
            return cls(root, fingerprint, dict(noted["metrics"]), committed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
            return None  # never written, or by another release

    def add(self, name: str, artifact: Artifact) -> None:
        """Note that an output is where it stays."""
        self.committed[name] = artifact
        self.write()

    def write(self) -> None:
        """Note it, whole or not at all."""
        note = {
            "fingerprint": self.fingerprint,
            "metrics": self.metrics,
            "committed": {name: made.to_dict() for name, made in self.committed.items()},
        }
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self.root / f"{_NOTE}.tmp"
        temporary.write_text(json.dumps(note), encoding="utf-8")
        temporary.replace(self.root / _NOTE)


def remove_old(work_directory: Path) -> None:
    """Remove the workplaces of programs that ended a week ago, and that no try came back for."""
    oldest = time.time() - _KEPT_SECONDS
    for note in work_directory.glob(f"*/{_NOTE}"):
        try:
            is_old = note.stat().st_mtime < oldest
        except FileNotFoundError:  # its own try has just removed it
            continue
        if is_old:
            shutil.rmtree(note.parent, ignore_errors=True)
