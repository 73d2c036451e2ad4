"""What a step may use of its compute."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.definition.graph import ResourcesSpec
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import Gpus

Size = int | str
"""Bytes, or a number with a unit: ``512M``, ``8G``, ``1.5Gi``. K, M, G, T are powers of 1024."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])?i?B?", re.IGNORECASE)
_GPU_ID = re.compile(r"\d+|(GPU|MIG)-[^\s,]+|[^\s,/=]+/[^\s,/=]+=[^\s,]+")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(what: str, value: Size | None) -> int | None:
    """Return a size in bytes.

    Args:
        what: What it is the size of, for the error.
        value: A number of bytes, or text such as ``8G``; None stays None.

    Raises:
        DefinitionError: It is no positive size.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(str(value).strip())
        size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise DefinitionError(
            f"{what}: {value!r} is no size; write bytes, or such as '512M' or '8G'"
        )
    return size


def parse_gpus(what: str, value: Any) -> int | tuple[str, ...] | None:
    """Return the GPUs of a compute: how many, or their ids.

    Args:
        what: What they are the GPUs of, for the error.
        value: A number; a list of numbers and ids, or the same as text with commas; None stays None.

    Raises:
        DefinitionError: It is none of these, or names one GPU twice.
    """
    if isinstance(value, str):
        value = int(value) if value.strip().isdecimal() else value.split(",")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, list | tuple):
        ids = tuple(
            str(item).strip() if isinstance(item, int | str) and item is not True else ""
            for item in value
        )
        if all(_GPU_ID.fullmatch(item) for item in ids) and len(set(ids)) == len(ids):
            return ids
    raise DefinitionError(
        f"{what}: {value!r} is neither a number of GPUs nor a list of their ids, each one once; write 2, or "
        "such as ['GPU-6a1c03f2', 'GPU-77d0e5b1'] or [0, 1]"
    )


def count_gpus(gpus: Gpus) -> int | None:
    """Return how many GPUs a compute has by its definition; None if that is not said."""
    return len(gpus) if isinstance(gpus, tuple) else gpus


class Resources:
    """What one step may use; what is None is left to the compute.

    Args:
        cpus: CPU cores; fractions are allowed.
        memory: Bytes, or such as ``8G``.
        gpus: Number of GPUs.
        gpu_type: A model of GPU, where the compute offers several.
        shm_size: Shared memory (``/dev/shm``), for data loaders with several processes.

    Raises:
        DefinitionError: A number is not positive.
    """

    def __init__(
        self,
        *,
        cpus: float | None = None,
        memory: Size | None = None,
        gpus: int | None = None,
        gpu_type: str | None = None,
        shm_size: Size | None = None,
    ) -> None:
        for what, number in (("cpus", cpus), ("gpus", gpus)):
            if number is not None and number < 0:
                raise DefinitionError(f"Resources: {what} is {number}; it has to be 0 or more")
        self.spec = ResourcesSpec(
            cpus=cpus,
            memory=parse_size("Resources: memory", memory),
            gpus=gpus,
            gpu_type=gpu_type,
            shm_size=parse_size("Resources: shm_size", shm_size),
        )

    def __repr__(self) -> str:
        fields = self.spec.model_dump(exclude_none=True)
        return f"Resources({', '.join(f'{name}={value!r}' for name, value in fields.items())})"
