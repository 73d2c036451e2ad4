"""What is kept with a step run besides its outputs: ``./outputs``, ``./logs`` and the like."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from airflow_mlpipelines.storage.stores import Store

RUN_FILES = "_run"
"""Where they are, below the directory of the step run."""


def keep_files(store: Store, directory: str, sources: Iterable[Path]) -> list[str]:
    """Put files and directories on a datastore under their own names; return what was kept, as URIs.

    What is not there, or is an empty directory, is left out, and so are symbolic links. On a file store the
    sources are gone afterwards.

    Raises:
        DataError: The store can't be written to.
    """
    kept = []
    for source in sources:
        # A step can put a link in their place, to what it may not read itself.
        if source.is_symlink() or not source.exists():
            continue
        if source.is_dir() and not any(source.iterdir()):
            continue
        path = f"{directory}/{source.name}"
        if store.is_local:
            target = store.local_path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(str(source), str(target))
        else:
            _send(store, path, source)
        kept.append(store.uri(path))
    return kept


def _send(store: Store, path: str, source: Path) -> None:
    for file in [source] if source.is_file() else sorted(_files_below(source)):
        name = path if file == source else f"{path}/{file.relative_to(source).as_posix()}"
        with store.translate_errors(name, "written"), store.publish(name) as place:
            store.filesystem.put_file(str(file), place)


def _files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
