"""Real small objects for tests: graphs, steps, artifacts."""

from __future__ import annotations

from typing import Any

from airflow_mlpipelines.definition.graph import (
    DatastoreSpec,
    InputSpec,
    LocalComputeSpec,
    OutputSpec,
    PipelineGraph,
    StepOutputRef,
    StepSpec,
)

COMMAND_OPERATOR = "airflow_mlpipelines.operators.steps:CommandOperator"


def make_step(step_id: str, *, after: tuple[str, ...] = (), **fields: Any) -> StepSpec:
    """Return a step that takes the output ``out`` of each step in ``after`` and makes its own."""
    inputs = tuple(
        InputSpec(name=f"from_{name}", source=StepOutputRef(step=name, output="out"))
        for name in after
    )
    defaults: dict[str, Any] = {
        "id": step_id,
        "name": step_id,
        "type": "CommandStep",
        "operator": COMMAND_OPERATOR,
        "inputs": inputs,
        "outputs": (OutputSpec(name="out", datastore="store"),),
        "compute": "local",
    }
    return StepSpec(**{**defaults, **fields})


def make_graph(*steps: StepSpec, **fields: Any) -> PipelineGraph:
    """Return a graph of these steps on one local compute and one datastore in memory."""
    defaults: dict[str, Any] = {
        "name": "pipeline",
        "workspace": "test",
        "root": "/nowhere",
        "default_datastore": "store",
        "datastores": {"store": DatastoreSpec(name="store", url="memory://store")},
        "computes": {"local": LocalComputeSpec(name="local")},
        "steps": steps,
    }
    return PipelineGraph(**{**defaults, **fields})
