"""A step's definition as Markdown, for the task's page in the Airflow UI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines.definition.graph import (
    ExternalDataSpec,
    InputPart,
    LiteralPart,
    OutputPart,
)
from airflow_mlpipelines.definition.transfer import TRANSFER_OPERATOR

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import (
        Argument,
        ArgumentPart,
        DistributedSpec,
        EnvironmentSpec,
        InputSource,
        PipelineGraph,
        StepSpec,
    )


def describe_step(step: StepSpec, graph: PipelineGraph) -> str:
    """Return what the step is, as Markdown: what it runs, on what, with what data.

    The text is the same on every machine: no absolute path is in it, so that Airflow makes no new
    version of a DAG that did not change. No secret is in it either, only their names.
    """
    compute = graph.computes[step.compute]
    rows = [("type", step.type)]
    command = describe_command(step)
    if command:
        rows.append(("command", f"`{command}`"))
    rows.append(("compute", f"{compute.name} ({compute.type})"))
    if step.environment is not None:
        rows.append(("environment", _describe_environment(step.environment)))
    rows += [(f"input `{item.name}`", _describe_source(item.source)) for item in step.inputs]
    place = step.config.get("destination_path") if step.operator == TRANSFER_OPERATOR else None
    where = f"{place} on" if place else "on"
    rows += [
        (f"output `{item.name}`", f"{where} {item.datastore}")
        for item in step.outputs
        if item.upload is None
    ]
    rows += [
        (f"upload `{item.name}`", f"to {item.upload.path} on {item.datastore}")
        for item in step.outputs
        if item.upload is not None
    ]
    asked = step.resources.model_dump(exclude_none=True)
    if asked:
        rows.append(("resources", ", ".join(f"{name} {value}" for name, value in asked.items())))
    if step.distributed is not None:
        rows.append(("distributed", describe_distribution(step.distributed)))
    if step.secrets:
        rows.append(("secrets", ", ".join(sorted(step.secrets))))
    if not step.allow_reuse:
        rows.append(("reuse", "off: this step runs in every run"))
    head = f"{step.description}\n\n" if step.description else ""
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    return f"{head}| {step.name} | |\n|---|---|\n{table}\n"


def describe_distribution(spec: DistributedSpec) -> str:
    """Return how many processes a step consists of, such as ``pytorch, 2 nodes with 4 processes each``."""
    if spec.framework == "tensorflow":
        servers = (
            f" and {spec.parameter_servers} parameter servers" if spec.parameter_servers else ""
        )
        workers = spec.nodes * spec.processes_per_node
        nodes = f" on {spec.nodes} nodes" if spec.nodes > 1 else ""
        chief = ", a chief" if spec.chief else ""
        return f"tensorflow{chief}, {workers} workers{servers}{nodes}"
    return f"{spec.framework}, {spec.nodes} nodes with {spec.processes_per_node} processes each"


def describe_command(step: StepSpec) -> str:
    """Return the step's command line with the names of ports where their paths will be."""
    words = ["python", step.script] if step.script is not None else []
    words += [describe_argument(argument) for argument in (*step.command, *step.arguments)]
    return " ".join(words)


def describe_argument(argument: Argument) -> str:
    """Return one argument, with ``{name}`` for a port and ``{parameter:name}`` for a parameter."""
    return "".join(_describe_part(part) for part in argument)


def _describe_part(part: ArgumentPart) -> str:
    if isinstance(part, LiteralPart):
        return part.text
    if isinstance(part, (InputPart, OutputPart)):
        return f"{{{part.name}}}"
    return f"{{parameter:{part.name}}}"


def _describe_environment(environment: EnvironmentSpec) -> str:
    parts = [environment.image] if environment.image else []
    parts += ["Dockerfile"] if environment.dockerfile is not None else []
    parts += [f"Python {environment.python_version}"] if environment.python_version else []
    # Not those with paths, which differ between machines.
    parts += [line for line in environment.pip if line[:1].isalnum() and "file:" not in line]
    parts += environment.apt
    parts += ["a conda file"] if environment.conda is not None else []
    return ", ".join(parts) or environment.name or "variables only"


def _describe_source(source: InputSource) -> str:
    if isinstance(source, ExternalDataSpec):
        return f"{source.path} on {source.datastore}"
    return f"`{source.output}` of {source.step}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
