"""What ``azureml.core`` offers inside a step: ``Run``."""

# This file also goes into containers of any Python from 3.8 on, beside `runtime/` alone.
from __future__ import annotations

from airflow_mlpipelines.runtime.run import Run

__all__ = ["Run"]


def __getattr__(name: str) -> object:
    raise ImportError(
        f"cannot import {name!r} from {__name__!r}: Run is all that it has. Whatever defines pipelines is "
        "in airflow_mlpipelines itself, and not available inside a step's process."
    )
