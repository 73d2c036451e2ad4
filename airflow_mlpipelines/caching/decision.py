"""What a run does with each step, and why: decisions, and the plan that they make together."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import CacheError, DataError
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from airflow_mlpipelines.definition.graph import ParameterValue

PLAN_VERSION = 1


class Decision(StrEnum):
    """What happens to a step."""

    REUSE = "reuse"
    RUN = "run"
    LATER = "later"
    """Known only when the steps before it are over: they may make the same bytes as before."""


class MissReason(StrEnum):
    """Why a step is not reused."""

    NEVER_RUN = "never_run"
    CHANGED = "changed"
    OUTPUT_GONE = "output_gone"
    REUSE_OFF = "reuse_off"
    REGENERATE = "regenerate"
    NOT_CACHEABLE = "not_cacheable"
    UPSTREAM_RUNS = "upstream_runs"

    @property
    def is_forced(self) -> bool:
        """Whether the step runs whatever is remembered."""
        return self in (MissReason.REUSE_OFF, MissReason.REGENERATE)


@dataclass(frozen=True)
class StepDecision:
    """What a run does with one step.

    Attributes:
        reason: In words, for people.
        miss: Why it is not reused; None if it is.
        fingerprint: 64 hex digits; None where it is not known yet, or never.
        outputs: Of a reused step: its outputs.
        step_run: Of a reused step: the id of the step run that made them.
        seconds_saved: Of a reused step: what making them took.
    """

    decision: Decision
    reason: str
    miss: MissReason | None = None
    fingerprint: str | None = None
    outputs: Mapping[str, Artifact] = field(default_factory=dict)
    step_run: str | None = None
    seconds_saved: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without what is empty."""
        data: dict[str, Any] = {"decision": str(self.decision), "reason": self.reason}
        if self.miss is not None:
            data["miss"] = str(self.miss)
        if self.fingerprint is not None:
            data["fingerprint"] = self.fingerprint
        if self.outputs:
            data["outputs"] = {name: self._describe(item) for name, item in self.outputs.items()}
        if self.step_run is not None:
            data["step_run"] = self.step_run
        if self.seconds_saved is not None:
            data["seconds_saved"] = round(self.seconds_saved, 3)
        return data

    def _describe(self, artifact: Artifact) -> dict[str, Any]:
        """Return an output's JSON form, in which the step run stands only if it is another."""
        data = {**artifact.to_dict(), "step_run": artifact.step_run}
        if artifact.step_run == self.step_run:
            del data["step_run"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepDecision:
        """Return the decision that :meth:`to_dict` described.

        Raises:
            KeyError, ValueError: It is none.
            DataError: An output is no artifact.
        """
        return cls(
            decision=Decision(data["decision"]),
            reason=data["reason"],
            miss=MissReason(data["miss"]) if "miss" in data else None,
            fingerprint=data.get("fingerprint"),
            outputs={
                name: Artifact.from_dict({"step_run": data.get("step_run"), **item})
                for name, item in data.get("outputs", {}).items()
            },
            step_run=data.get("step_run"),
            seconds_saved=data.get("seconds_saved"),
        )


@dataclass(frozen=True)
class RunPlan:
    """What a run does with every step, and all that was pinned when it started.

    Attributes:
        code: Each step's digest of its code; None for steps without files of their own.
        environments: Each step's digest of its environment.
        snapshots: Each step's digest of its source directory, as stored for this run.
        external: What each piece of external data was pinned to, by ``<datastore>/<path>``; None
            where nothing was there.
        parameters: The run's parameters.
        offers: The step and the output behind each output that the pipeline as a whole offers.
    """

    steps: Mapping[str, StepDecision]
    code: Mapping[str, str | None] = field(default_factory=dict)
    environments: Mapping[str, str] = field(default_factory=dict)
    snapshots: Mapping[str, str] = field(default_factory=dict)
    external: Mapping[str, Artifact | None] = field(default_factory=dict)
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    offers: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the one in XCom. Texts that many steps share stand there once."""
        texts: dict[str, int] = {}

        def number(text: str | None) -> int | None:
            return texts.setdefault(text, len(texts)) if text is not None else None

        steps = {}
        for step, item in self.steps.items():
            data = item.to_dict()
            data["reason"] = number(item.reason)
            steps[step] = data
        return {
            "version": PLAN_VERSION,
            "steps": steps,
            "code": {step: number(text) for step, text in self.code.items()},
            "environments": {step: number(text) for step, text in self.environments.items()},
            "snapshots": {step: number(text) for step, text in self.snapshots.items()},
            "texts": list(texts),
            "external": {
                key: item.to_dict() if item is not None else None
                for key, item in self.external.items()
            },
            "parameters": dict(self.parameters),
            "offers": {name: list(place) for name, place in self.offers.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, only: Collection[str] | None = None) -> RunPlan:
        """Return the plan that :meth:`to_dict` described.

        Args:
            data: The JSON form.
            only: Ids of the steps whose decisions are wanted, where not all are.

        Raises:
            CacheError: It is none, or was made by another release.
        """
        try:
            if data["version"] != PLAN_VERSION:
                raise CacheError(
                    f"the plan of this run is of version {data['version']!r}, made by another release; "
                    f"this one reads {PLAN_VERSION}. Clear the run's first task to plan anew."
                )
            texts = data["texts"]
            return cls(
                steps={
                    step: StepDecision.from_dict({**item, "reason": texts[item["reason"]]})
                    for step, item in data["steps"].items()
                    if only is None or step in only
                },
                code={
                    step: texts[place] if place is not None else None
                    for step, place in data["code"].items()
                },
                environments={step: texts[place] for step, place in data["environments"].items()},
                snapshots={step: texts[place] for step, place in data["snapshots"].items()},
                external={
                    key: Artifact.from_dict(item) if item is not None else None
                    for key, item in data["external"].items()
                },
                parameters=data["parameters"],
                offers={name: (step, output) for name, (step, output) in data["offers"].items()},
            )
        except (DataError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CacheError(f"the plan of this run is damaged: {error!r}") from error
