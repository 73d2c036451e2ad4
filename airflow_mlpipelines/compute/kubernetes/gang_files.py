"""What the nodes of a gang have made, as one: each node's pod has had directories of its own."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import KEPT_DIRECTORIES
from airflow_mlpipelines.compute.kubernetes.channel import CommandError
from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError, PodUnreachableError
from airflow_mlpipelines.compute.kubernetes.transfer import collect
from airflow_mlpipelines.compute.threads import in_parallel
from airflow_mlpipelines.exceptions import StepFailedError
from airflow_mlpipelines.runtime.metrics import METRICS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from airflow_mlpipelines.compute.base import Stage, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec

log = logging.getLogger(__name__)

_SHOWN = 10


def fetch_nodes(
    cluster: Cluster,
    launch: StepLaunch,
    pod: PodSpec,
    pods: Sequence[str],
    *,
    with_outputs: bool,
) -> None:
    """Bring to the worker what all nodes have made, as if they had shared their directories.

    Args:
        cluster: The cluster.
        launch: The step run.
        pod: Any of its pods.
        pods: The names of all, by node.
        with_outputs: Whether the step succeeded; else what can't be had is only told of.

    Raises:
        StepFailedError: The pods don't give all outputs, or are gone.
        ClusterError: The API server refuses.
        ClusterLostError: It does not answer, or nothing gets through to a pod.
    """
    fetched: list[int] = []

    def fetch(node: int) -> None:
        named = replace(pod, name=pods[node])
        own = replace(launch, stage=stage_of_node(launch.stage, node))
        try:
            collect(cluster.again(), named, own, emit=log.info, with_outputs=with_outputs)
        except (ClusterError, PodUnreachableError) as error:
            if with_outputs and not isinstance(error, CommandError):
                raise  # what the pod holds can be had later
            if with_outputs:
                raise StepFailedError(
                    launch.step_name,
                    f"it ended well, but its outputs can't be fetched from pod {named.name!r}: {error}",
                ) from error
            log.warning("The files of pod %s can't be fetched: %s", named.name, error)
        else:
            fetched.append(node)

    in_parallel(fetch, range(len(pods)))
    for node in sorted(fetched):
        refused = merge_node(launch.stage, node) if node else []
        if refused:
            log.warning(
                "Of files that several nodes have written, that of the lowest node is kept. Not kept of node %s: %s",
                node,
                ", ".join(refused[:_SHOWN]),
            )


def stage_of_node(stage: Stage, node: int) -> Stage:
    """Return where the files of a node arrive: the step's own directories for node 0."""
    if node == 0:
        return stage
    root = stage.root / "nodes" / str(node)
    own = replace(
        stage,
        root=root,
        code=root / "code",
        run=root / "run",
        outputs_root=root / "outputs",
        outputs={
            name: root / "outputs" / path.relative_to(stage.outputs_root)
            for name, path in stage.outputs.items()
        },
    )
    for directory in (own.code, own.run, own.outputs_root):
        directory.mkdir(parents=True, exist_ok=True)
    return own


def merge_node(stage: Stage, node: int) -> list[str]:
    """Move what a node has made to the step's own directories; return the files that were there already.

    Those are left as they are: of files with one path, that of the lowest node counts. No link is followed: the
    program may have made it, and what it leads to here is the worker's.
    """
    own = stage_of_node(stage, node)
    refused = _merge(own.outputs_root, stage.outputs_root)
    for name in KEPT_DIRECTORIES:
        source, target = own.code / name, stage.code / name
        if _is_folder(source) and not target.is_symlink():
            _merge(source, target)
    _merge_metrics(own.run / METRICS_FILE, stage.run / METRICS_FILE)
    shutil.rmtree(own.root, ignore_errors=True)
    return refused


def _merge(source: Path, target: Path) -> list[str]:
    refused = []
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        there = target / entry.name
        if not there.exists() and not there.is_symlink():
            shutil.move(entry, there)  # the datastore may be on another disk
        elif _is_folder(entry) and _is_folder(there):
            refused += [f"{entry.name}/{name}" for name in _merge(entry, there)]
        else:
            refused.append(entry.name)
    return refused


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _merge_metrics(source: Path, target: Path) -> None:
    """Append a node's metrics to the step's, numbered on."""
    if source.is_symlink() or target.is_symlink() or not source.is_file():
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
