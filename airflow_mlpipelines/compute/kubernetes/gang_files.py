"""What the nodes of a gang have made, as one: each node's pod has had directories of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import KEPT_DIRECTORIES
from airflow_mlpipelines.runtime.metrics import METRICS_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.compute.base import Stage


def stage_of_node(stage: Stage, node: int) -> Stage:
    """Return where the files of a node arrive: the step's own directories for node 0."""
    if node == 0:
        return stage
    root = stage.root / "nodes" / str(node)
    own = replace(
        stage, root=root, code=root / "code", run=root / "run", outputs_root=root / "outputs"
    )
    for directory in (own.code, own.run, own.outputs_root):
        directory.mkdir(parents=True, exist_ok=True)
    return own


def merge_node(stage: Stage, node: int) -> list[str]:
    """Move what a node has made to the step's own directories; return the files that were there already.

    Those are left as they are: of files with one path, that of the lowest node counts.
    """
    own = stage_of_node(stage, node)
    refused = _merge(own.outputs_root, stage.outputs_root)
    for name in KEPT_DIRECTORIES:
        if (own.code / name).is_dir():
            _merge(own.code / name, stage.code / name)
    _merge_metrics(own.run / METRICS_FILE, stage.run / METRICS_FILE)
    shutil.rmtree(own.root, ignore_errors=True)
    return refused


def _merge(source: Path, target: Path) -> list[str]:
    refused = []
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        there = target / entry.name
        if not there.exists() and not there.is_symlink():
            entry.replace(there)
        elif _is_folder(entry) and _is_folder(there):
            refused += [f"{entry.name}/{name}" for name in _merge(entry, there)]
        else:
            refused.append(entry.name)
    return refused


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _merge_metrics(source: Path, target: Path) -> None:
    """Append a node's metrics to the step's, numbered on."""
    if not source.is_file():
        return
    there = _whole_lines(target) if target.is_file() else []
    number = len(there)
    added = []
    for line in _whole_lines(source):
        number += 1
        added.append(json.dumps({**line, "n": number}, ensure_ascii=False) + "\n")
    with target.open("a", encoding="utf-8") as file:
        file.writelines(added)


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """Return a file's lines; what a program was killed in the middle of is left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]
