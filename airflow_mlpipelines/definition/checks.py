"""What can be wrong with a graph that is well formed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from airflow_mlpipelines._naming import make_identifier, suggest
from airflow_mlpipelines._protocols import find_protocol
from airflow_mlpipelines.definition.graph import (
    REGENERATE_OUTPUTS,
    DockerComputeSpec,
    KubernetesComputeSpec,
    LocalComputeSpec,
)
from airflow_mlpipelines.definition.resources import count_gpus
from airflow_mlpipelines.definition.transfer import TRANSFER_OPERATOR
from airflow_mlpipelines.exceptions import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlpipelines.definition.graph import ComputeSpec, PipelineGraph, StepSpec

_MAX_ID = 200


def check_graph(graph: PipelineGraph) -> list[Problem]:
    """Return all problems of a graph, in the order of its steps."""
    problems = list(_check_names(graph))
    checked: dict[tuple[str, str | None], list[Problem]] = {}
    for step in graph.steps:
        if step.source_directory is not None:
            place = (step.source_directory, step.script)
            if place not in checked:
                checked[place] = list(_check_code(graph.root, *place))
            problems += [replace(problem, step=step.name) for problem in checked[place]]
        problems += _check_compute(step, graph.computes[step.compute])
        problems += _check_registry(step, graph.computes[step.compute])
        problems += _check_outputs(step, graph)
        problems += _check_numbers(step)
        problems += _check_ignore(step)
    return problems


def _check_names(graph: PipelineGraph) -> Iterator[Problem]:
    if make_identifier(graph.name) != graph.name or len(graph.name) > _MAX_ID:
        yield Problem(
            f"the pipeline's name {graph.name!r} can't be a DAG id: letters, digits, '_', '-' and '.' can, "
            f"up to {_MAX_ID} of them. How about {make_identifier(graph.name)[:_MAX_ID]!r}?"
        )
    if any(parameter.name == REGENERATE_OUTPUTS for parameter in graph.parameters):
        yield Problem(
            f"{REGENERATE_OUTPUTS!r} is a parameter that every pipeline has; rename yours",
            port=f"parameter {REGENERATE_OUTPUTS!r}",
        )
    default = graph.datastores[graph.default_datastore]
    if find_protocol(default.url).read_only:
        yield Problem(
            f"the default datastore {default.name!r} ({default.url}) can only be read, but the code of "
            "steps is kept there. Make another one the default"
        )
    offered: dict[str, str] = {}
    for step in graph.steps:
        for output in step.outputs:
            name = output.pipeline_output_name
            if name is None:
                continue
            if name in offered:
                yield Problem(
                    f"pipeline_output_name {name!r} is that of step {offered[name]!r} already",
                    step=step.name,
                    port=f"output {output.name!r}",
                )
            offered[name] = step.name


def _check_code(root: str, source_directory: str, script: str | None) -> Iterator[Problem]:
    directory = Path(root, source_directory)
    if not directory.is_dir():
        yield Problem(
            f"source_directory {source_directory!r} is not there; it is looked for from {root}"
        )
    elif script is None:
        return
    elif ".." in PurePosixPath(script).parts or PurePosixPath(script).is_absolute():
        yield Problem(f"script {script!r} has to be inside source_directory {source_directory!r}")
    elif not (directory / script).is_file():
        others = [file.name for file in directory.glob("*.py")]
        yield Problem(
            f"script {script!r} is not in source_directory {source_directory!r}."
            f"{suggest(script, others)}"
        )


def _check_nodes(step: StepSpec, compute: ComputeSpec) -> Iterator[Problem]:
    nodes = step.distributed.nodes if step.distributed is not None else 1
    most = compute.max_nodes if isinstance(compute, KubernetesComputeSpec) else None
    if most is not None and nodes > most:
        yield Problem(
            f"is distributed over {nodes} nodes, but compute {compute.name!r} has max_nodes {most}, and the step would "
            "wait for ever. Raise it (and the slots of its Airflow pool), or ask for fewer nodes",
            step=step.name,
        )
    if nodes == 1 or isinstance(compute, KubernetesComputeSpec):
        return
    mode = compute.network_mode or "" if isinstance(compute, DockerComputeSpec) else ""
    if mode in ("host", "none") or mode.startswith("container:"):
        yield Problem(
            f"is distributed over {nodes} nodes, which need a network of their own, but compute {compute.name!r} "
            f"has network_mode {mode!r}. Leave it out there, or set nodes=1",
            step=step.name,
        )
    gpus, asked = count_gpus(compute.gpus), step.resources.gpus
    if gpus and asked and asked <= gpus < nodes * asked:
        host = "one Docker host" if isinstance(compute, DockerComputeSpec) else "one machine"
        yield Problem(
            f"asks for {asked} GPUs on each of {nodes} nodes, but compute {compute.name!r} is {host} with "
            f"{gpus} (its 'gpus')",
            step=step.name,
        )


def _check_compute(step: StepSpec, compute: ComputeSpec) -> Iterator[Problem]:
    asked = step.resources
    if step.operator == TRANSFER_OPERATOR and not isinstance(compute, LocalComputeSpec):
        yield Problem(
            f"moves data on the Airflow worker, but compute {compute.name!r} is of type {compute.type!r}. "
            "Name one of type 'local', or none.",
            step=step.name,
        )
        return
    yield from _check_nodes(step, compute)
    gpus = count_gpus(compute.gpus)
    # A local compute that does not say has as many as the worker's machine, which only that one knows.
    known = gpus is not None or not isinstance(compute, LocalComputeSpec)
    if asked.gpus and known and asked.gpus > (gpus or 0):
        has = f"only {gpus}" if gpus else "none"
        yield Problem(
            f"asks for {asked.gpus} GPUs, but compute {compute.name!r} has {has} (its 'gpus')",
            step=step.name,
        )
    if isinstance(compute, LocalComputeSpec):
        if step.environment is not None and step.environment.apt:
            yield Problem(
                f"its environment has apt packages, but compute {compute.name!r} is local: they would have to be "
                "installed on the worker's machine itself. Use a Docker compute, or leave them out.",
                step=step.name,
            )
        return
    # With a Python version, the base is the official image of that Python.
    image = step.environment is not None and (
        step.environment.image is not None
        or step.environment.dockerfile is not None
        or step.environment.python_version is not None
    )
    if not image and compute.image is None:
        yield Problem(
            f"runs on compute {compute.name!r} ({compute.type}), which needs an image: give the step an "
            "Environment with an image or a python_version, or the compute an image of its own",
            step=step.name,
        )
    for what in ("cpus", "memory", "shm_size"):
        wanted, limit = getattr(asked, what), getattr(compute, what)
        if wanted is not None and limit is not None and wanted > limit:
            yield Problem(
                f"asks for {what} {wanted}, but compute {compute.name!r} has {limit}",
                step=step.name,
            )


def _check_registry(step: StepSpec, compute: ComputeSpec) -> Iterator[Problem]:
    is_built = step.environment is not None and step.environment.needs_build
    if is_built and isinstance(compute, KubernetesComputeSpec) and compute.registry is None:
        yield Problem(
            f"its environment has to be built, but no registry is named for the nodes of compute {compute.name!r} to "
            "pull it from. Write `registry: {url: registry.example.com/team/env, conn_id: …}` into the workspace "
            "file, or give the environment an image alone.",
            step=step.name,
        )


def _check_outputs(step: StepSpec, graph: PipelineGraph) -> Iterator[Problem]:
    for output in step.outputs:
        url = graph.datastores[output.datastore].url
        if find_protocol(url).read_only:
            yield Problem(
                f"goes to datastore {output.datastore!r} ({url}), from which can only be read. Name another "
                "datastore.",
                step=step.name,
                port=f"output {output.name!r}",
            )


def _check_numbers(step: StepSpec) -> Iterator[Problem]:
    if step.retries is not None and step.retries < 0:
        yield Problem(f"retries is {step.retries}; it has to be 0 or more", step=step.name)
    for what in ("timeout", "retry_delay"):
        seconds = getattr(step, f"{what}_seconds")
        if seconds is not None and seconds <= 0:
            yield Problem(f"{what} is {seconds}; it has to be more than 0 seconds", step=step.name)


def _check_ignore(step: StepSpec) -> Iterator[Problem]:
    if not step.ignore:
        return
    known = {*step.params, *step.parameter_names}
    for name in step.ignore:
        if name not in known:
            yield Problem(
                f"ignore names {name!r}, which is neither a param nor a parameter that the step uses."
                f"{suggest(name, known)}",
                step=step.name,
            )
