"""Planning a run: snapshot the code, pin the data, resolve the environments, decide step by step.

Runs where the run's first task runs, and in ``mlpipelines plan``. Nothing of it is done at parse time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.caching.closure import CodeDigest, SourceDirectory
from airflow_mlpipelines.caching.planner import (
    PlanRequest,
    StepEnvironment,
    external_key,
    plan_steps,
)
from airflow_mlpipelines.compute.launchers import make_launcher
from airflow_mlpipelines.definition.graph import REGENERATE_ALL, ExternalDataSpec
from airflow_mlpipelines.definition.transfer import TRANSFER_OPERATOR
from airflow_mlpipelines.exceptions import DefinitionError, MLPipelinesError
from airflow_mlpipelines.storage.snapshots import list_source_files, make_snapshot
from airflow_mlpipelines.storage.transfer import missing_artifacts, pin_external

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.compute.base import ResolvedEnvironment
    from airflow_mlpipelines.definition.graph import (
        ParameterSpec,
        ParameterValue,
        PipelineGraph,
        StepSpec,
    )
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.stat_cache import StatCache
    from airflow_mlpipelines.storage.stores import StoreSet

_PARALLEL_PINS = 8


def plan_run(  # noqa: PLR0913 - all that a plan depends on
    graph: PipelineGraph,
    *,
    parameters: Mapping[str, object],
    regenerate: Collection[str],
    index: MetadataIndex,
    stores: StoreSet,
    cache: StatCache | None = None,
    blobs: BlobCache | None = None,
    snapshot: bool = True,
    emit: Callable[[str], None] | None = None,
) -> RunPlan:
    """Return what every step of a run with these parameters will do, and why.

    Args:
        graph: The checked pipeline.
        parameters: Values by name; a parameter that is missing has its default. Others are ignored.
        regenerate: Ids of steps that shall run whatever is remembered, or ``all``.
        index: The metadata database.
        stores: The registered datastores.
        cache: Digests of files already read.
        blobs: Where data read from remote datastores are kept for the steps.
        snapshot: Whether to store the code for the run. A plan that nobody will run needs none.
        emit: Takes lines for the log, which say how far the data have been read.

    Raises:
        DefinitionError: A parameter's value is of the wrong type, or ``regenerate`` names no step.
        MLPipelinesError: Code, data or an environment can't be read or resolved.
    """
    values = {
        parameter.name: coerce_parameter(graph, parameter, parameters.get(parameter.name))
        for parameter in graph.parameters
    }
    code, snapshots = _read_code(graph, stores, snapshot=snapshot)
    environments, resolved = _resolve_environments(graph)
    contents = {item.digest: dict(item.description) for item in resolved}
    request = PlanRequest(
        graph=graph,
        parameters=values,
        code=code,
        environments=environments,
        external=_pin_external_data(graph, stores, cache, blobs, emit),
        snapshots=snapshots,
        regenerate=_expand_regenerate(graph, regenerate),
        contents=contents,
    )
    plan = plan_steps(request, index=index, verify=partial(missing_artifacts, stores=stores))
    if snapshot:
        code_contents = {item.digest: item.to_content() for item in code.values() if item}
        index.put_contents({**contents, **code_contents})
    return plan


def coerce_parameter(
    graph: PipelineGraph, parameter: ParameterSpec, value: object
) -> ParameterValue:
    """Return a run's value of a parameter, as its declared type.

    ``1`` is a fine float. Everything else must have the type already: Airflow's trigger form and its
    REST API have checked the value against the parameter's schema.

    Raises:
        DefinitionError: It is of another type.
    """
    if value is None:
        return parameter.default
    if (
        parameter.type == "float"
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ):
        return float(value)
    if parameter.type == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if parameter.type == "bool" and isinstance(value, bool):
        return value
    if parameter.type == "string" and isinstance(value, str):
        return value
    raise DefinitionError(
        f"Pipeline {graph.name!r}: parameter {parameter.name!r} is of type {parameter.type}, but got "
        f"a value of type {type(value).__name__}."
    )


def source_directory(graph: PipelineGraph, step: StepSpec) -> Path | None:
    """Return the absolute directory of the step's own files, or None if it has none."""
    if step.source_directory is None:
        return None
    return Path(graph.root) / step.source_directory


def _expand_regenerate(graph: PipelineGraph, regenerate: Collection[str]) -> frozenset[str]:
    steps = {step.id for step in graph.steps}
    if REGENERATE_ALL in regenerate:
        return frozenset(steps)
    unknown = sorted(set(regenerate) - steps)
    if unknown:
        raise DefinitionError(
            f"Pipeline {graph.name!r}: regenerate_outputs names {unknown}, but the steps are "
            f"{sorted(steps)} (or 'all')."
        )
    return frozenset(regenerate)


def _read_code(
    graph: PipelineGraph, stores: StoreSet, *, snapshot: bool
) -> tuple[dict[str, CodeDigest | None], dict[str, str]]:
    """Return the code's digest and the snapshot's digest of each step that has files of its own."""
    sources: dict[Path, SourceDirectory] = {}
    snapshot_of: dict[Path, str] = {}
    digests: dict[tuple[Path, str | None, str], CodeDigest] = {}
    code: dict[str, CodeDigest | None] = {}
    snapshots: dict[str, str] = {}
    for step in graph.steps:
        directory = source_directory(graph, step)
        if directory is None:
            code[step.id] = None
            continue
        try:
            if directory not in sources:
                files = list_source_files(directory)
                sources[directory] = SourceDirectory(directory, files)
                if snapshot:
                    snapshot_of[directory] = make_snapshot(directory, stores.default, files).digest
            key = (directory, step.script, step.code)
            if key not in digests:
                digests[key] = sources[directory].digest_code(step.script, mode=step.code)
        except MLPipelinesError as error:
            error.add_note(f"while reading the code of step {step.name!r} of {graph.name!r}")
            raise
        code[step.id] = digests[key]
        if snapshot:
            snapshots[step.id] = snapshot_of[directory]
    return code, snapshots


def _resolve_environments(
    graph: PipelineGraph,
) -> tuple[dict[str, StepEnvironment], list[ResolvedEnvironment]]:
    """Resolve each environment on each compute once."""
    resolved: dict[tuple[str, str], ResolvedEnvironment] = {}
    environments = {}
    for step in graph.steps:
        if step.operator == TRANSFER_OPERATOR:  # a copy is the same whatever makes it
            environments[step.id] = StepEnvironment(digest("environment-v1", None))
            continue
        spec = step.environment
        key = (step.compute, spec.model_dump_json() if spec is not None else "")
        if key not in resolved:
            try:
                resolved[key] = make_launcher(graph.computes[step.compute]).resolve_environment(
                    spec
                )
            except MLPipelinesError as error:
                error.add_note(f"while resolving the environment of step {step.name!r}")
                raise
        item = resolved[key]
        environments[step.id] = StepEnvironment(item.digest, item.cacheable, item.problem)
    return environments, list(resolved.values())


def _pin_external_data(
    graph: PipelineGraph,
    stores: StoreSet,
    cache: StatCache | None,
    blobs: BlobCache | None,
    emit: Callable[[str], None] | None,
) -> dict[str, Artifact | None]:
    wanted: dict[str, ExternalDataSpec] = {}
    fetched = set()
    for step in graph.steps:
        for item in step.inputs:
            if isinstance(item.source, ExternalDataSpec):
                key = external_key(item.source)
                if key not in wanted or item.source.pin == "content":  # for all who read it
                    wanted[key] = item.source
                if item.mode != "direct" and step.operator != TRANSFER_OPERATOR:
                    fetched.add(key)

    def pin(key: str) -> Artifact | None:
        source = wanted[key]
        return pin_external(
            stores[source.datastore],
            source.path,
            how=source.pin,
            cache=cache,
            blobs=blobs,
            keep=key in fetched,
            emit=emit,
        )

    if len(wanted) < 2:  # threads pay from the second on
        return {key: pin(key) for key in wanted}
    with ThreadPoolExecutor(_PARALLEL_PINS) as pool:
        return dict(zip(wanted, pool.map(pin, wanted), strict=True))
