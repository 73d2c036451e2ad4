"""Planning in waves: every step whose inputs are known is looked up at once, wave after wave.

A hit gives the digests that the steps after it need, so a whole unchanged graph is decided before
anything runs: with one query, and one check of all outputs that would be reused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.caching.explain import content_digests, describe_change, find_nearest
from airflow_mlpipelines.caching.fingerprint import Fingerprint, step_fingerprint
from airflow_mlpipelines.definition.graph import ExternalDataSpec, StepOutputRef
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from airflow_mlpipelines.caching.closure import CodeDigest
    from airflow_mlpipelines.caching.index import CacheEntry, MetadataIndex, StepRunRecord
    from airflow_mlpipelines.definition.graph import (
        InputSpec,
        ParameterValue,
        PipelineGraph,
        StepSpec,
    )

log = logging.getLogger(__name__)

Verify = Callable[[Sequence[Artifact]], list[tuple[Artifact, str]]]
"""Returns those of the artifacts that are not as they were, each with the reason in words."""


@dataclass(frozen=True)
class StepEnvironment:
    """What a step's environment came down to: its digest, and whether anything may be reused on it."""

    digest: str
    cacheable: bool = True
    problem: str | None = None


@dataclass(frozen=True)
class PlanRequest:
    """All that was found out when a run starts.

    Attributes:
        parameters: The run's parameters, every one of the graph's.
        code: Each step's code; None for steps without files of their own.
        external: What external data was pinned to, by ``<datastore>/<path>``; None where nothing is.
        regenerate: Ids of steps that shall run whatever is remembered.
        contents: What is behind the digests of environments, for the reasons.
    """

    graph: PipelineGraph
    parameters: Mapping[str, ParameterValue]
    code: Mapping[str, CodeDigest | None]
    environments: Mapping[str, StepEnvironment]
    external: Mapping[str, Artifact | None]
    snapshots: Mapping[str, str]
    regenerate: Collection[str] = ()
    contents: Mapping[str, object] = field(default_factory=dict)


def plan_steps(request: PlanRequest, *, index: MetadataIndex, verify: Verify) -> RunPlan:
    """Return what the run does with every step, and why.

    Raises:
        CacheError: The index can't be asked.
    """
    decisions = _Waves(request, index, verify).decide()
    return RunPlan(
        steps={step.id: decisions[step.id] for step in request.graph.steps},
        code={name: code.digest if code else None for name, code in request.code.items()},
        environments={name: item.digest for name, item in request.environments.items()},
        snapshots=request.snapshots,
        external=request.external,
        parameters=request.parameters,
        offers=request.graph.offers,
    )


class _Waves:
    """The decisions of one plan, as they grow."""

    def __init__(self, request: PlanRequest, index: MetadataIndex, verify: Verify) -> None:
        self._request = request
        self._index = index
        self._verify = verify
        self._decisions: dict[str, StepDecision] = {}
        self._fingerprints: dict[str, Fingerprint] = {}
        self._destinations = {name: spec.url for name, spec in request.graph.datastores.items()}
        self._entries: dict[str, CacheEntry | None] = {}
        self._gone: dict[str, str] = {}

    def decide(self) -> dict[str, StepDecision]:
        """Return every step's decision."""
        steps = [step.id for step in self._request.graph.steps]
        # Mostly it is the newest entry of a step that hits: so a chain of steps is one query, too.
        self._entries |= self._index.find_newest_entries(self._request.graph.name, steps)
        self._walk()
        outputs = [
            artifact for item in self._decisions.values() for artifact in item.outputs.values()
        ]
        self._gone = {artifact.uri: why for artifact, why in self._verify(outputs)}
        if self._gone:  # what hit without these outputs is a part of what has been verified
            self._walk()
        self._explain_changes()
        return self._decisions

    def _walk(self) -> None:
        """Decide every step, those outputs left out that are known to be gone."""
        steps = {step.id: step for step in self._request.graph.steps}
        waves = TopologicalSorter({name: _producers(step) for name, step in steps.items()})
        waves.prepare()
        while waves.is_active():
            ready = waves.get_ready()
            self._decide_wave([steps[name] for name in ready])
            waves.done(*ready)

    def _decide_wave(self, wave: list[StepSpec]) -> None:
        candidates: list[StepSpec] = []
        for step in wave:
            decision = self._decide_without_looking(step)
            if decision is not None:
                self._decisions[step.id] = decision
            else:
                candidates.append(step)
                self._fingerprints[step.id] = self._fingerprint(step)
        self._look_up({self._fingerprints[step.id].digest for step in candidates})
        for step in candidates:
            fingerprint = self._fingerprints[step.id].digest
            entry = self._entries[fingerprint]
            self._decisions[step.id] = _decide(step, fingerprint, entry, self._gone)

    def _look_up(self, fingerprints: set[str]) -> None:
        unknown = fingerprints - self._entries.keys()
        if unknown:
            found = self._index.find_entries(unknown)
            self._entries |= {fingerprint: found.get(fingerprint) for fingerprint in unknown}

    def _decide_without_looking(self, step: StepSpec) -> StepDecision | None:
        if step.id in self._request.regenerate:
            return StepDecision(
                Decision.RUN, "regenerate_outputs asks for it", MissReason.REGENERATE
            )
        if not step.allow_reuse:
            return StepDecision(Decision.RUN, "allow_reuse is False", MissReason.REUSE_OFF)
        environment = self._request.environments[step.id]
        if not environment.cacheable:
            reason = f"nothing can be reused: {environment.problem}"
            return StepDecision(Decision.RUN, reason, MissReason.NOT_CACHEABLE)
        running = [
            name
            for name in sorted(_producers(step))
            if self._decisions[name].decision is not Decision.REUSE
        ]
        if running:  # what it will read is not there yet
            verb = "has" if len(running) == 1 else "have"
            return StepDecision(
                Decision.LATER,
                f"decided once {_list(running)} {verb} run",
                MissReason.UPSTREAM_RUNS,
            )
        return None

    def _fingerprint(self, step: StepSpec) -> Fingerprint:
        request = self._request
        code = request.code[step.id]
        return step_fingerprint(
            step,
            code=code.digest if code is not None else None,
            environment=request.environments[step.id].digest,
            parameters=request.parameters,
            inputs={item.name: self._input_digest(item) for item in step.inputs},
            destinations=self._destinations,
        )

    def _input_digest(self, item: InputSpec) -> str | None:
        source = item.source
        if isinstance(source, ExternalDataSpec):
            artifact = self._request.external[external_key(source)]
            return artifact.digest if artifact is not None else None
        return self._decisions[source.step].outputs[source.output].digest

    def _explain_changes(self) -> None:
        """Say of every step that changed what is different from the nearest earlier run."""
        changed = [
            name
            for name, decision in self._decisions.items()
            if decision.miss is MissReason.CHANGED
        ]
        if not changed:
            return
        earlier = self._index.find_earlier_runs(self._request.graph.name, changed)
        nearest = {
            name: find_nearest(self._fingerprints[name].ingredients, earlier.get(name, ()))
            for name in changed
        }
        contents = self._contents_of([run for run in nearest.values() if run is not None])
        for name in changed:
            miss, reason = describe_change(
                nearest[name], self._fingerprints[name].ingredients, contents
            )
            self._decisions[name] = replace(self._decisions[name], reason=reason, miss=miss)

    def _contents_of(self, runs: list[StepRunRecord]) -> dict[str, object]:
        wanted = {digest for run in runs for digest in content_digests(run.ingredients or {})}
        wanted |= {item.digest for item in self._request.environments.values()}
        code = [item for item in self._request.code.values() if item is not None]
        return {
            **self._index.get_contents(wanted),
            **{item.digest: item.to_content() for item in code},
            **self._request.contents,
        }


def _decide(
    step: StepSpec, fingerprint: str, entry: CacheEntry | None, gone: Mapping[str, str]
) -> StepDecision:
    if entry is None:
        return StepDecision(Decision.RUN, "", MissReason.CHANGED, fingerprint=fingerprint)
    missing = [name for name in (item.name for item in step.outputs) if name not in entry.outputs]
    lost = [
        f"output {name!r}: {gone[artifact.uri]}"
        for name, artifact in entry.outputs.items()
        if artifact.uri in gone
    ]
    lost += [f"output {name!r} is not remembered" for name in missing]
    if lost:
        return StepDecision(
            Decision.RUN, "; ".join(lost), MissReason.OUTPUT_GONE, fingerprint=fingerprint
        )
    return StepDecision(
        Decision.REUSE,
        f"nothing changed since {entry.created_at:%Y-%m-%d %H:%M}",
        fingerprint=fingerprint,
        outputs=entry.outputs,
        step_run=entry.step_run,
        seconds_saved=entry.seconds,
    )


def _producers(step: StepSpec) -> set[str]:
    """Return the ids of the steps that the step takes data from."""
    return {item.source.step for item in step.inputs if isinstance(item.source, StepOutputRef)}


def external_key(source: ExternalDataSpec) -> str:
    """Return the key under which a plan keeps what external data was pinned to."""
    return f"{source.datastore}/{source.path}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
