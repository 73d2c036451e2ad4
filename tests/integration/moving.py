"""What tests of several stores do alike: a directory that a step made, and a transfer of it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.stores import open_store
from airflow_mlpipelines.storage.transfer import pin_external

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.stores import Store


def make_tree(root: Path) -> Path:
    """Make a directory with a name that is not ASCII in it, and a file of 20 MiB."""
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("hello")
    (root / "sub" / "grüße 🛫.txt").write_text("world")
    (root / "large").write_bytes(os.urandom(20 << 20))
    return root


def transfer(folder: Path, source: tuple[Store, str], target: tuple[Store, str]) -> Artifact:
    """Transfer what is at a path of a datastore to a path of another one; its notes are in ``folder``."""
    ends = open_end(*source), open_end(*target)
    notes = open_store("notes", f"file://{folder}/notes")
    journal = Journal(notes, ends[0].uri, ends[1].uri)
    artifact = pin_external(*source, how="version")
    assert artifact is not None
    blobs, stop = BlobCache(folder / "b"), threading.Event()
    return Transfer(artifact, *ends, journal, blobs, lambda _: None, stop).run()
