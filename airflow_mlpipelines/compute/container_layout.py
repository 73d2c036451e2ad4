"""Where a step's container finds its places: the same paths in whatever runs containers."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.base import ProcessPaths

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.compute.base import Stage
    from airflow_mlpipelines.definition.graph import ResourcesSpec

LABEL_PREFIX = "airflow-mlpipelines."
STEP_RUN_LABEL = f"{LABEL_PREFIX}step_run"
ROOT = "/mlp"
CODE = f"{ROOT}/code"
HOME = f"{ROOT}/home"
OUTPUTS = f"{ROOT}/outputs"
INPUTS = f"{ROOT}/inputs"
RUN = f"{ROOT}/run"
RUNTIME = f"{ROOT}/runtime"
HOME_VARIABLES = {"HOME": HOME, "USER": "mlp", "LOGNAME": "mlp"}
"""For a number that the image's passwd file does not know: it has neither a home nor a name."""
PYTHON = "python3"
"""Not ``python``: the images of many distributions lack it, and whoever has it has this one too."""


def container_paths(stage: Stage, python: str | None) -> ProcessPaths:
    """Return where a container finds the places of ``stage``.

    A file keeps its own name, below a directory named as the input: programs go by suffixes
    such as ``.csv.gz``. A directory is found under the name of its input.
    """
    outputs = {
        name: posixpath.join(OUTPUTS, path.relative_to(stage.outputs_root).as_posix())
        for name, path in stage.outputs.items()
    }
    inputs = {name: input_target(name, path) for name, path in stage.inputs.items()}
    inputs |= {name: posixpath.join(INPUTS, path) for name, path in stage.carried.items()}
    return ProcessPaths(
        code=CODE,
        runtime=RUNTIME,
        run=RUN,
        inputs=inputs,
        outputs=outputs,
        python=python or PYTHON,
    )


def input_target(name: str, path: Path) -> str:
    """Return where the container finds the input ``name``, which lies at ``path`` on the worker."""
    target = posixpath.join(INPUTS, name)
    return target if path.is_dir() else posixpath.join(target, path.name)


def choose_shm_size(
    wanted: ResourcesSpec, *, default: int | None, gpus: int, memory: int | None
) -> int | None:
    """Return the bytes of shared memory, or None for what the runtime gives.

    With GPUs it is half the memory, if nobody says otherwise: data loaders pass batches through it,
    and the 64 MB of a container end in a bus error.
    """
    size = wanted.shm_size if wanted.shm_size is not None else default
    if size is None and gpus and memory is not None:
        return memory // 2
    return size
