"""Azure-ML-style machine-learning pipelines on Apache Airflow."""

# This file also goes into containers of any Python from 3.8 on, beside `runtime/` alone.
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from airflow_mlpipelines.definition.computes import (
        DockerCompute,
        KubernetesCompute,
        LocalCompute,
    )
    from airflow_mlpipelines.definition.data import DataReference, PipelineData
    from airflow_mlpipelines.definition.distributed import Mpi, PyTorch, TensorFlow
    from airflow_mlpipelines.definition.environment import Environment
    from airflow_mlpipelines.definition.graph import PipelineGraph
    from airflow_mlpipelines.definition.parameters import PipelineParameter
    from airflow_mlpipelines.definition.pipeline import Pipeline
    from airflow_mlpipelines.definition.resources import Resources
    from airflow_mlpipelines.definition.run_configuration import RunConfiguration
    from airflow_mlpipelines.definition.steps import (
        CommandStep,
        PipelineStep,
        PythonScriptStep,
        StepSequence,
    )
    from airflow_mlpipelines.definition.transfer import DataTransferStep
    from airflow_mlpipelines.definition.workspace import Datastore, Workspace
    from airflow_mlpipelines.runtime.run import Run
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.submission.experiment import Experiment
    from airflow_mlpipelines.submission.run import PipelineRun

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "CommandStep",
    "DataReference",
    "DataTransferStep",
    "Datastore",
    "DockerCompute",
    "Environment",
    "Experiment",
    "KubernetesCompute",
    "LocalCompute",
    "Mpi",
    "Pipeline",
    "PipelineData",
    "PipelineGraph",
    "PipelineParameter",
    "PipelineRun",
    "PipelineStep",
    "PyTorch",
    "PythonScriptStep",
    "Resources",
    "Run",
    "RunConfiguration",
    "StepSequence",
    "TensorFlow",
    "Workspace",
    "__version__",
]

_HOMES = {
    "Artifact": "storage.artifact",
    "CommandStep": "definition.steps",
    "DataReference": "definition.data",
    "DataTransferStep": "definition.transfer",
    "Datastore": "definition.workspace",
    "DockerCompute": "definition.computes",
    "Environment": "definition.environment",
    "Experiment": "submission.experiment",
    "KubernetesCompute": "definition.computes",
    "LocalCompute": "definition.computes",
    "Mpi": "definition.distributed",
    "Pipeline": "definition.pipeline",
    "PipelineData": "definition.data",
    "PipelineGraph": "definition.graph",
    "PipelineParameter": "definition.parameters",
    "PipelineRun": "submission.run",
    "PipelineStep": "definition.steps",
    "PyTorch": "definition.distributed",
    "PythonScriptStep": "definition.steps",
    "Resources": "definition.resources",
    "Run": "runtime.run",
    "RunConfiguration": "definition.run_configuration",
    "StepSequence": "definition.steps",
    "TensorFlow": "definition.distributed",
    "Workspace": "definition.workspace",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        module = import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{__name__}.{home}".startswith(error.name):
            raise  # a dependency is missing, not a part of this package
        raise ImportError(
            f"{name!r} defines pipelines, and only Run is available inside a step's process."
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
