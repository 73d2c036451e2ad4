"""Pipeline parameters as JSON schemas, the form in which Airflow checks and shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.definition.graph import REGENERATE_ALL, REGENERATE_OUTPUTS

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import ParameterSpec, PipelineGraph

_JSON_TYPES = {"string": "string", "int": "integer", "float": "number", "bool": "boolean"}


def make_param_schemas(
    graph: PipelineGraph, *, prefix: str = ""
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return each run parameter's name with its default and its JSON schema.

    The trigger form and the REST API check values against them. Besides the pipeline's own there is
    ``regenerate_outputs``: the tasks of steps to run again whatever is remembered, or ``all``.

    Args:
        graph: The pipeline.
        prefix: What task groups put before the ids of its tasks.
    """
    schemas = {parameter.name: _make_schema(parameter) for parameter in graph.parameters}
    steps = [f"{prefix}{step.id}" for step in graph.steps]
    schemas[REGENERATE_OUTPUTS] = (
        [],
        {
            "type": "array",
            "items": {"type": "string", "enum": [REGENERATE_ALL, *steps]},
            "examples": [REGENERATE_ALL, *steps],
            "title": "Regenerate outputs",
            "description": "Steps that shall run even if nothing changed; 'all' for every step.",
            "section": "Reuse",
        },
    )
    return schemas


def _make_schema(parameter: ParameterSpec) -> tuple[Any, dict[str, Any]]:
    schema: dict[str, Any] = {"type": _JSON_TYPES[parameter.type]}
    if parameter.choices is not None:
        schema["enum"] = list(parameter.choices)
    if parameter.minimum is not None:
        schema["minimum"] = parameter.minimum
    if parameter.maximum is not None:
        schema["maximum"] = parameter.maximum
    if parameter.description:
        schema["description"] = parameter.description
    schema["section"] = "Pipeline parameters"
    return parameter.default, schema
