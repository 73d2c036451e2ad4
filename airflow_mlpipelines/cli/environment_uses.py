"""The environments that ``mlpipelines environment`` is asked about: those of a pipeline, or of a workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.definition.resolution import with_registry
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.definition.graph import (
        ComputeSpec,
        EnvironmentSpec,
        PipelineGraph,
    )
    from airflow_mlpipelines.definition.workspace import Workspace

_WORKSPACE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class EnvironmentUse:
    """One environment on one compute.

    Attributes:
        title: Its name; where it has none, what it is.
        spec: Its definition; None for what a compute has by itself.
        steps: The names of the steps on it.
    """

    title: str
    spec: EnvironmentSpec | None
    compute: ComputeSpec
    steps: tuple[str, ...]

    @property
    def is_built(self) -> bool:
        """Whether it is made from packages, rather than there as it is."""
        if self.spec is None:
            return False
        return self.spec.has_packages if self.compute.type == "local" else self.spec.needs_build


def load_uses(file: Path, *, pipeline: str | None, compute: str | None) -> list[EnvironmentUse]:
    """Return the environments of a pipeline, or those that a workspace names.

    Args:
        file: A Python file that makes a pipeline; or a workspace file, or a directory with one.
        pipeline: Which pipeline, where the file makes several.
        compute: Only those on this compute; of a workspace, what they are there.

    Raises:
        DefinitionError: The file is not there, or something in it is wrong; or there is no such compute.
    """
    if file.is_dir() or file.suffix in _WORKSPACE_SUFFIXES:
        from airflow_mlpipelines.definition.workspace import Workspace

        return find_workspace_uses(Workspace.from_config(file), compute)
    from airflow_mlpipelines.cli.files import load_pipeline

    graph = load_pipeline(file, pipeline).graph
    if compute is not None and compute not in graph.computes:
        raise DefinitionError(
            f"--compute: no step runs on {compute!r}, but on {list_options(graph.computes)}."
            f"{suggest(compute, graph.computes)}"
        )
    return [use for use in find_uses(graph) if compute in (None, use.compute.name)]


def find_workspace_uses(workspace: Workspace, compute: str | None) -> list[EnvironmentUse]:
    """Return each environment that a workspace names, on one of its computes, or on the default one."""
    target = workspace.compute_targets[compute] if compute else workspace.default_compute
    spec = with_registry(target.spec, workspace.registry)
    return [
        EnvironmentUse(title=name, spec=environment.spec, compute=spec, steps=())
        for name, environment in workspace.environments.items()
    ]


def find_uses(graph: PipelineGraph) -> list[EnvironmentUse]:
    """Return each environment of a pipeline on each compute, in the order of the steps."""
    steps: dict[tuple[str, str], list[str]] = {}
    specs: dict[tuple[str, str], EnvironmentSpec | None] = {}
    for step in graph.steps:
        key = (step.compute, step.environment.model_dump_json() if step.environment else "")
        steps.setdefault(key, []).append(step.name)
        specs[key] = step.environment
    return [
        EnvironmentUse(
            title=_title(spec, steps[key][0]),
            spec=spec,
            compute=graph.computes[key[0]],
            steps=tuple(dict.fromkeys(steps[key])),
        )
        for key, spec in specs.items()
    ]


def _title(spec: EnvironmentSpec | None, step: str) -> str:
    if spec is None:
        return "(the compute's own)"
    return spec.name or spec.image or f"(that of step {step})"


def choose(uses: list[EnvironmentUse], name: str | None) -> list[EnvironmentUse]:
    """Return those with this name, or with a step of this name.

    Raises:
        DefinitionError: There are none.
    """
    if name is None:
        return uses
    chosen = [use for use in uses if name == use.title or name in use.steps]
    if not chosen:
        titles = [use.title for use in uses]
        raise DefinitionError(
            f"--environment: there is no {name!r}, neither as an environment nor as a step; there is "
            f"{list_options(titles)}.{suggest(name, titles)}"
        )
    return chosen
