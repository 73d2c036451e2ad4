"""A pipeline's graph as text and as Mermaid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines.definition.graph import ExternalDataSpec, StepOutputRef

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import PipelineGraph, StepSpec


def draw_text(graph: PipelineGraph) -> str:
    """Return the graph as lines: each step with what it reads, makes and waits for."""
    lines = [f"{graph.name}  ({len(graph.steps)} steps, workspace {graph.workspace})"]
    lines += [
        f"  parameter {item.name}: {item.type} = {item.default!r}" for item in graph.parameters
    ]
    for step in graph.steps:
        lines.append(f"  {step.id}  [{step.type} on {step.compute}]")
        lines += [f"    <- {text}" for text in _sources(step)]
        lines += [f"    -> {output.name}" for output in step.outputs]
    return "\n".join(lines)


def _sources(step: StepSpec) -> list[str]:
    sources = []
    for item in step.inputs:
        source = item.source
        if isinstance(source, ExternalDataSpec):
            sources.append(f"{item.name}: {source.path or '/'} on {source.datastore}")
        else:
            sources.append(f"{item.name}: {source.output} of {source.step}")
    return sources + [f"after {name}" for name in step.run_after]


def draw_mermaid(graph: PipelineGraph) -> str:
    """Return the graph as a Mermaid flowchart, for READMEs and pull requests."""
    ids = {step.id: f"s{number}" for number, step in enumerate(graph.steps)}
    lines = ["flowchart LR"]
    lines += [f'  {ids[step.id]}["{_label(step.name)}"]' for step in graph.steps]
    external: dict[str, str] = {}
    for step in graph.steps:
        for item in step.inputs:
            source = item.source
            if isinstance(source, ExternalDataSpec):
                key = external.setdefault(f"{source.datastore}/{source.path}", f"d{len(external)}")
                lines.append(
                    f'  {key}[("{_label(source.path or source.datastore)}")] --> {ids[step.id]}'
                )
            elif isinstance(source, StepOutputRef):
                lines.append(f"  {ids[source.step]} -- {_label(source.output)} --> {ids[step.id]}")
        lines += [f"  {ids[name]} -.-> {ids[step.id]}" for name in step.run_after]
    return "\n".join(lines)


def _label(text: str) -> str:
    return text.replace('"', "'")
