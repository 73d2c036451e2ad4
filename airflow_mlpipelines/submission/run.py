"""Runs of a pipeline: what their steps did, why, and what came out."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from airflow_mlpipelines.caching.decision import Decision, RunPlan
from airflow_mlpipelines.exceptions import CacheError, SubmissionError
from airflow_mlpipelines.storage.artifact import Artifact, is_artifact

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from airflow_mlpipelines.definition.graph import PipelineGraph

StepState = Literal["ran", "reused", "failed", "skipped", "not_started", "running"]
FINISHED = "Finished"
FAILED = "Failed"
_STATUS = {"success": FINISHED, "failed": FAILED, "queued": "NotStarted", "running": "Running"}
_FOLLOW_SECONDS = 0.5
_FAILED_STATES = ("failed", "upstream_failed")


class RunSource(Protocol):
    """Where the facts of one run come from: this process, or a server."""

    dag_id: str
    run_id: str

    def get_state(self) -> str:
        """Return Airflow's state of the run: ``queued``, ``running``, ``success`` or ``failed``."""

    def list_tasks(self) -> list[dict[str, Any]]:
        """Return each task's ``task_id``, ``state``, ``duration`` and ``start_date``."""

    def find_xcom(self, task_id: str, key: str) -> Any | None:
        """Return an XCom's value as it is stored, or None."""

    def get_log(self, task_id: str, try_number: int) -> list[str]:
        """Return the lines of a task's log."""

    def cancel(self) -> None:
        """End the run."""


@dataclass(frozen=True)
class StepRun:
    """What one step did in a run.

    Attributes:
        name: The author's name of the step.
        task_id: Its Airflow task.
        state: Whether it ran, was reused, failed, was skipped with a branch, or has not started.
        reason: Why, in words.
        seconds: How long it worked; 0 if it did not.
        outputs: By name, as Artifacts in their JSON form.
    """

    name: str
    task_id: str
    state: StepState
    reason: str = ""
    seconds: float = 0.0
    seconds_saved: float = 0.0
    outputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_reused(self) -> bool:
        """Whether earlier outputs were taken."""
        return self.state == "reused"

    def get_status(self) -> str:
        """Return Azure ML's word for the state."""
        words = {"failed": FAILED, "not_started": "NotStarted", "running": "Running"}
        return words.get(self.state, FINISHED)

    def get_output_data(self, name: str) -> Artifact:
        """Return an output.

        Raises:
            SubmissionError: The step has none of this name in this run.
        """
        found = self.outputs.get(name)
        if found is None or not is_artifact(found):
            raise SubmissionError(
                f"step {self.name!r} has no output {name!r} in this run; it has {sorted(self.outputs)}"
            )
        return Artifact.from_dict(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the one that ``mlpipelines run --json`` prints."""
        return {
            "name": self.name,
            "task_id": self.task_id,
            "state": self.state,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "outputs": dict(self.outputs),
        }


class PipelineRun:
    """One run of a pipeline.

    Attributes:
        id: Airflow's run id.
        dag_id: The DAG.
    """

    def __init__(self, graph: PipelineGraph, source: RunSource, *, experiment: str = "") -> None:
        self._graph = graph
        self._source = source
        self.experiment = experiment
        self.dag_id = source.dag_id
        self.id = source.run_id

    def get_status(self) -> str:
        """Return ``NotStarted``, ``Running``, ``Finished`` or ``Failed``."""
        return _STATUS.get(self._source.get_state(), "Running")

    def get_steps(self) -> list[StepRun]:
        """Return what every step did so far, in the order of the pipeline."""
        return self._read_steps()

    def _read_steps(self, *, but: Collection[str] = ()) -> list[StepRun]:
        tasks = {task["task_id"]: task for task in self._source.list_tasks()}
        plan = self._find_plan()
        return [
            self._read_step(step.id, step.name, tasks.get(step.id), plan)
            for step in self._graph.steps
            if step.id not in but
        ]

    def find_step_run(self, name: str) -> list[StepRun]:
        """Return the steps of this name; names may repeat."""
        return [step for step in self.get_steps() if name in (step.name, step.task_id)]

    def get_pipeline_output(self, pipeline_output_name: str) -> Artifact:
        """Return an output that the pipeline as a whole offers.

        Raises:
            SubmissionError: There is none of this name, or it was not made.
        """
        offered = self._graph.offers
        if pipeline_output_name not in offered:
            raise SubmissionError(
                f"pipeline {self._graph.name!r} offers no output {pipeline_output_name!r}; it offers "
                f"{sorted(offered)}"
            )
        step_id, output = offered[pipeline_output_name]
        step = next(step for step in self.get_steps() if step.task_id == step_id)
        return step.get_output_data(output)

    def wait_for_completion(
        self,
        show_output: bool = True,
        timeout_seconds: float = float("inf"),
        raise_on_error: bool = True,
    ) -> str:
        """Return the run's status when it is over.

        Args:
            show_output: Whether each step's end is told on standard error.
            timeout_seconds: How long to wait.
            raise_on_error: Whether a failed run is an error.

        Raises:
            SubmissionError: The run failed, or is not over in time.
        """
        self.follow(_say if show_output else lambda _: None, timeout_seconds=timeout_seconds)
        status = self.get_status()
        if raise_on_error and status == FAILED:
            failed = [step for step in self.get_steps() if step.state == "failed"]
            names = ", ".join(repr(step.name) for step in failed) or "a task around the steps"
            raise SubmissionError(f"run {self.id} of {self.dag_id} failed: {names}")
        return status

    def follow(
        self, report: Callable[[StepRun], None], *, timeout_seconds: float = float("inf")
    ) -> None:
        """Wait until the run is over; report every step once, when it is over.

        Raises:
            SubmissionError: It is not over in time.
        """
        deadline = time.monotonic() + timeout_seconds
        told: set[str] = set()
        while True:
            over = self._source.get_state() in ("success", "failed")
            for step in self._read_steps(but=told):
                if over or step.state not in ("not_started", "running"):
                    told.add(step.task_id)
                    report(step)
            if over:
                return
            if time.monotonic() > deadline:
                raise SubmissionError(f"run {self.id} is not over after {timeout_seconds} s")
            time.sleep(_FOLLOW_SECONDS)

    def get_log(self, task_id: str, try_number: int = 1) -> list[str]:
        """Return the lines of a task's log."""
        return self._source.get_log(task_id, try_number)

    def cancel(self) -> None:
        """End the run: its running steps are killed."""
        self._source.cancel()

    def summary(self) -> dict[str, Any]:
        """Return what the run did, in the JSON form that ``mlpipelines run --json`` prints."""
        return {
            "dag_id": self.dag_id,
            "run_id": self.id,
            "state": self._source.get_state(),
            "steps": [step.to_dict() for step in self.get_steps()],
        }

    def _find_plan(self) -> RunPlan | None:
        data = self._source.find_xcom("cache_sensor", "plan")
        try:
            return RunPlan.from_dict(data) if isinstance(data, dict) else None
        except CacheError:  # made by another release; what the tasks say is still to be had
            return None

    def _read_step(
        self, step_id: str, name: str, task: Mapping[str, Any] | None, plan: RunPlan | None
    ) -> StepRun:
        state = str((task or {}).get("state") or "none")
        decision = plan.steps.get(step_id) if plan is not None else None
        reason = decision.reason if decision is not None else ""
        if state == "skipped" and decision is not None and decision.decision is Decision.REUSE:
            outputs = {key: item.to_dict() for key, item in decision.outputs.items()}
            saved = decision.seconds_saved or 0.0
            return StepRun(name, step_id, "reused", reason, 0.0, saved, outputs)
        if state in ("success", "skipped"):
            record = self._source.find_xcom(step_id, "step_run")
            if isinstance(record, dict):
                return StepRun(
                    name,
                    step_id,
                    record["state"],
                    record["reason"],
                    record["seconds"],
                    record.get("seconds_saved") or 0.0,
                    self._source.find_xcom(step_id, "return_value") or {},
                )
            return StepRun(name, step_id, "skipped", "an input was not made in this run")
        if state == "failed":
            record = self._source.find_xcom(step_id, "step_run")
            reason = (
                record["reason"] if isinstance(record, dict) else "its task failed; see its log"
            )
            return StepRun(name, step_id, "failed", reason, (task or {}).get("duration") or 0.0)
        if state == "upstream_failed":
            return StepRun(name, step_id, "not_started", "a step before it failed")
        running = state in ("running", "queued", "deferred", "up_for_retry")
        return StepRun(name, step_id, "running" if running else "not_started", reason)


def _say(step: StepRun) -> None:
    seconds = f"{step.seconds:.1f} s" if step.state == "ran" else ""
    print(f"{step.state:<11} {step.name:<24} {seconds:>8}  {step.reason}", file=sys.stderr)  # noqa: T201
