"""Carrying out one step: look up, take the lease, have it made, remember it. Knows no Airflow."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlpipelines.caching.decision import Decision, MissReason
from airflow_mlpipelines.caching.explain import explain_miss
from airflow_mlpipelines.caching.fingerprint import step_fingerprint
from airflow_mlpipelines.caching.index import CacheEntry, StepRunRecord
from airflow_mlpipelines.compute.base import DetachedError
from airflow_mlpipelines.exceptions import (
    ComputeUnavailableError,
    DataError,
    EnvironmentBuildError,
    StepFailedError,
)
from airflow_mlpipelines.execution.heartbeat import LeaseHeldError, hold_lease
from airflow_mlpipelines.execution.program import StepProgram, release
from airflow_mlpipelines.storage.transfer import missing_artifacts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.caching.fingerprint import Fingerprint
    from airflow_mlpipelines.definition.graph import PipelineGraph, StepSpec
    from airflow_mlpipelines.execution.heartbeat import HeldLease
    from airflow_mlpipelines.execution.identity import TaskIdentity
    from airflow_mlpipelines.execution.services import Services
    from airflow_mlpipelines.storage.artifact import Artifact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """How a step came to its outputs.

    Attributes:
        state: Whether its program ran, or outputs made earlier were taken.
        reason: Why, in words.
        seconds: How long that took.
        seconds_saved: What the reused outputs had cost to make; 0 where it ran.
        step_run: The id of the step run that made the outputs.
        made_now: Whether the outputs are of this very try, and nobody remembers them yet.
    """

    state: Literal["ran", "reused"]
    reason: str
    seconds: float
    outputs: Mapping[str, Artifact]
    step_run: str
    fingerprint: str | None = None
    seconds_saved: float = 0.0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    made_now: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of all but the outputs, the one in XCom."""
        return {
            "state": self.state,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "seconds_saved": round(self.seconds_saved, 3),
            "fingerprint": self.fingerprint,
            "step_run": self.step_run,
        }


@dataclass(frozen=True)
class Resumption:
    """What the worker that goes on with a step gets from those before it.

    Attributes:
        news: What was found out meanwhile about the program.
        began_at: When the first worker began, in seconds of the epoch.
    """

    news: Mapping[str, Any]
    began_at: float


class StepDetachedError(Exception):
    """The step's program goes on without this worker; not a failure.

    Attributes:
        watch: What a trigger needs to wait for it.
        lease: The step's lease, for somebody to renew: ``fingerprint``, ``holder`` and ``token``; None without.
        began_at: As in :class:`Resumption`.
    """

    def __init__(
        self, watch: dict[str, Any], lease: dict[str, str] | None, began_at: float
    ) -> None:
        self.watch = watch
        self.lease = lease
        self.began_at = began_at
        super().__init__("the step's program goes on without this worker")


class StepRunner:
    """Carries out one step of one run. One instance serves one try."""

    def __init__(
        self,
        step: StepSpec,
        graph: PipelineGraph,
        *,
        identity: TaskIdentity,
        plan: RunPlan,
        inputs: Mapping[str, Artifact | None],
        services: Services,
        forced: str | None = None,
    ) -> None:
        """Prepare; nothing is touched yet.

        Args:
            step: The step.
            graph: The pipeline that it belongs to.
            identity: The task instance that this is.
            plan: What the run's first task found.
            inputs: What each input holds in this run; None for external data that is not there.
            services: What the step needs of the world.
            forced: Why the step runs whatever is remembered, in words; None if it need not.
        """
        self._step = step
        self._graph = graph
        self._identity = identity
        self._plan = plan
        self._inputs = inputs
        self._services = services
        self._forced = forced
        self._resumption: Resumption | None = None

    def run(self, resumption: Resumption | None = None) -> StepResult:
        """Return the step's outputs, reused if somebody has made them, else made now and committed.

        What happened is recorded in the index, also if it failed.

        Args:
            resumption: Given if its program has begun already, and went on without a worker.

        Raises:
            StepDetachedError: The program goes on without this worker.
            LeaseHeldError: Somebody else is making the same outputs right now.
            StepFailedError: The program failed.
            EnvironmentBuildError: Its environment can't be had.
            DataError: An input can't be had, or an output was not made.
            ComputeUnavailableError: Its compute was away, or had no place for it.
        """
        started = time.monotonic()
        if resumption is not None:
            self._resumption = resumption
            started -= max(time.time() - resumption.began_at, 0.0)
        fingerprint = self._fingerprint()
        try:
            result = self._reuse_or_make(fingerprint, started)
        except (LeaseHeldError, StepDetachedError):
            raise  # it goes on
        except (
            StepFailedError,
            EnvironmentBuildError,
            DataError,
            ComputeUnavailableError,
        ) as error:
            first_line = str(error).partition("\n")[0]
            seconds = time.monotonic() - started
            self._record(fingerprint, state="failed", reason=first_line, seconds=seconds)
            self._give_up(error)
            raise
        except BaseException as error:
            self._give_up(error)
            raise
        # Only now: had this worker been lost before, the next one would have found all that the program made.
        self._release()
        return result

    def _give_up(self, error: BaseException) -> None:
        """Leave nothing on the compute if no later try will come for it."""
        if not (self._identity.has_tries_left and getattr(error, "retryable", True)):
            self._release()

    def _release(self) -> None:
        release(self._services, self._identity, self._graph.computes[self._step.compute])

    def _reuse_or_make(self, fingerprint: Fingerprint | None, started: float) -> StepResult:
        if fingerprint is None:
            result = self._make(None, started)
            self._conclude(None, result)
            return result
        try:
            with hold_lease(
                self._services.index, fingerprint.digest, self._identity.holder
            ) as lease:
                # Only now: whoever held the lease before may have committed since the plan was made.
                # A program that has begun is seen through, whatever others have made meanwhile.
                found = None if self._resumption else self._look_up(fingerprint.digest, started)
                result = found or self._make(fingerprint, started, lease)
                self._conclude(fingerprint, result, lease)
        except LeaseHeldError:  # by somebody who makes anew what there is, maybe
            if self._resumption is not None:  # the lease ran out, with no triggerer to renew it
                result = self._make(fingerprint, started)
            else:
                found = self._look_up(fingerprint.digest, started)
                if found is None:
                    raise
                result = found
            self._conclude(fingerprint, result)
        return result

    def _conclude(
        self, fingerprint: Fingerprint | None, result: StepResult, lease: HeldLease | None = None
    ) -> None:
        """Remember what was made, note what happened and give the lease back: all of it, or nothing."""
        if lease is not None:
            lease.stop_renewing()
        with self._services.index.writing():
            if fingerprint is not None and result.made_now:
                self._remember(fingerprint, result)
            self._record(
                fingerprint,
                state=result.state,
                reason=result.reason,
                seconds=result.seconds,
                seconds_saved=result.seconds_saved,
                outputs=result.outputs,
                metrics=result.metrics,
            )
            if lease is not None:
                lease.release()

    def _record(self, fingerprint: Fingerprint | None, *, state: str, **facts: Any) -> None:
        identity = self._identity
        record = StepRunRecord(
            dag_id=identity.dag_id,
            run_id=identity.run_id,
            task_id=identity.task_id,
            map_index=identity.map_index,
            try_number=identity.try_number,
            pipeline=self._graph.name,
            step=self._step.id,
            step_run=identity.step_run_id,
            state=state,
            fingerprint=fingerprint.digest if fingerprint is not None else None,
            ingredients=fingerprint.ingredients if fingerprint is not None else None,
            **facts,
        )
        self._services.index.record_step_runs([record])

    def kill(self) -> None:
        """End the program, if one is running."""
        self._services.launcher.kill()

    # ---- whether ---------------------------------------------------------------------------

    def _fingerprint(self) -> Fingerprint | None:
        """Return the step's fingerprint, or None where nothing may be remembered."""
        step_id = self._step.id
        decision = self._plan.steps[step_id]
        if decision.miss is MissReason.NOT_CACHEABLE:
            return None
        return step_fingerprint(
            self._step,
            code=self._plan.code.get(step_id),
            environment=self._plan.environments[step_id],
            parameters=self._plan.parameters,
            inputs={
                name: artifact.digest if artifact is not None else None
                for name, artifact in self._inputs.items()
            },
            destinations={name: spec.url for name, spec in self._graph.datastores.items()},
        )

    def _look_up(self, fingerprint: str, started: float) -> StepResult | None:
        entry = self._services.index.find_entries([fingerprint]).get(fingerprint)
        if entry is None:
            return None
        own = entry.step_run == self._identity.step_run_id
        if not own and (self._forced is not None or not self._step.allow_reuse):
            return None
        gone = missing_artifacts(list(entry.outputs.values()), self._services.stores)
        if gone:
            _, why = gone[0]
            self._services.emit(f"Not reused: {why}")
            return None
        if own:
            return self._result("ran", "an earlier try had committed its outputs", entry, started)
        return self._result(
            "reused", "the same step was run before on the same inputs", entry, started
        )

    def _result(
        self, state: Literal["ran", "reused"], reason: str, entry: CacheEntry, started: float
    ) -> StepResult:
        return StepResult(
            state=state,
            reason=reason,
            seconds=time.monotonic() - started,
            outputs=entry.outputs,
            step_run=entry.step_run,
            fingerprint=entry.fingerprint,
            seconds_saved=entry.seconds if state == "reused" else 0.0,
        )

    def _why_not_reused(self, fingerprint: Fingerprint | None) -> str:
        decision = self._plan.steps[self._step.id]
        if self._forced is not None:
            return self._forced
        if decision.decision is Decision.LATER and fingerprint is not None:
            return explain_miss(
                self._services.index, self._graph.name, self._step.id, fingerprint.ingredients
            )
        return decision.reason

    # ---- how -------------------------------------------------------------------------------

    def _make(
        self, fingerprint: Fingerprint | None, started: float, lease: HeldLease | None = None
    ) -> StepResult:
        """Make the outputs and commit them: data first, then the entry."""
        reason = self._why_not_reused(fingerprint)
        if self._resumption is None:
            self._services.emit(f"Step {self._step.name!r} runs: {reason}")
        try:
            with ExitStack() as held:
                outputs, metrics = self._make_outputs(fingerprint, held)
        except DetachedError as error:
            left = lease.leave() if lease is not None else None
            began_at = time.time() - (time.monotonic() - started)
            raise StepDetachedError(error.watch, left, began_at) from error
        return StepResult(
            state="ran",
            reason=reason,
            seconds=time.monotonic() - started,
            outputs=outputs,
            step_run=self._identity.step_run_id,
            fingerprint=fingerprint.digest if fingerprint is not None else None,
            metrics=metrics,
            made_now=True,
        )

    def _make_outputs(
        self, fingerprint: Fingerprint | None, held: ExitStack
    ) -> tuple[dict[str, Artifact], dict[str, Any]]:
        """Run the program; return what it made, committed, and the metrics that it logged."""
        program = StepProgram(
            self._step,
            self._graph,
            identity=self._identity,
            plan=self._plan,
            inputs=self._inputs,
            services=self._services,
            news=self._resumption.news if self._resumption is not None else None,
        )
        digest = fingerprint.digest if fingerprint is not None else None
        return program.run(held, fingerprint=digest)

    def _remember(self, fingerprint: Fingerprint, result: StepResult) -> None:
        self._services.index.put_entry(
            CacheEntry(
                fingerprint=fingerprint.digest,
                pipeline=self._graph.name,
                step=self._step.id,
                step_type=self._step.type,
                outputs=dict(result.outputs),
                ingredients=fingerprint.ingredients,
                seconds=result.seconds,
                writer=self._services.writer,
                step_run=self._identity.step_run_id,
            )
        )
