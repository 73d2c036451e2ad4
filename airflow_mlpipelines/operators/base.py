"""The operator behind every step type: Airflow's side of carrying out a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mlpipelines.operators.document import describe_step

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlpipelines.definition.graph import PipelineGraph, StepSpec
    from airflow_mlpipelines.execution.heartbeat import LeaseHeldError
    from airflow_mlpipelines.execution.step import (
        Resumption,
        StepDetachedError,
        StepResult,
        StepRunner,
    )

STEP_RUN_KEY = "step_run"
METRICS_KEY = "metrics"
_WAIT_SECONDS = 2.0


class StepOperator(BaseOperator):
    """Runs one step of a pipeline on whatever compute it names, or reuses its earlier outputs.

    Its XComs: one per output, with the output's name as the key and an Artifact as the value;
    ``return_value`` with all of them, if there are any; ``step_run``, which says how the step came to them, or
    why it failed; ``metrics``, if its program logged any. A reused step ends ``skipped``, with the same XComs.

    The compiler makes these; they are not meant to be written by hand.
    """

    ui_color = "#e8f1fb"

    def __init__(self, *, step: StepSpec, graph: PipelineGraph, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step = step
        self.graph = graph
        self._runner: StepRunner | None = None

    @property
    def custom_operator_name(self) -> str:
        """What the UI shows as the operator: the step's type."""
        return self.step.type

    @property
    def doc_md(self) -> str | None:
        """The step's definition, for the UI. Made only when the DAG is serialized."""
        return self._doc_md or describe_step(self.step, self.graph)

    @doc_md.setter
    def doc_md(self, value: str | None) -> None:
        self._doc_md = value

    @property
    def prefix(self) -> str:
        """What task groups put before the ids of this pipeline's tasks; may be empty."""
        return self.task_id[: -len(self.step.id)]

    def runner_class(self) -> type[StepRunner]:
        """Return the class of what carries out the step. Asked when the task executes, not before."""
        from airflow_mlpipelines.execution.step import StepRunner

        return StepRunner

    def execute(self, context: Context) -> dict[str, Any] | None:
        """Return each output's name with its Artifact, in the JSON form; None if the step has no outputs.

        Raises:
            AirflowSkipException: The outputs were reused, or a required input was neither made nor
                reused, because a branch was not taken.
            AirflowFailException: It failed in a way that a retry would only repeat.
            StepFailedError: It failed; Airflow's retries apply.
            EnvironmentBuildError: What its environment is built from can't be reached; so too.
            DataError: An input can't be had, or an output was not made; so too.
            ComputeUnavailableError: Its compute was away, or had no place for it; so too.
        """
        return self._carry_out(context)

    def _carry_out(
        self, context: Context, resumption: Resumption | None = None
    ) -> dict[str, Any] | None:
        from airflow_mlpipelines.exceptions import (
            ComputeUnavailableError,
            DataError,
            EnvironmentBuildError,
            StepFailedError,
        )
        from airflow_mlpipelines.execution.heartbeat import LeaseHeldError
        from airflow_mlpipelines.execution.step import StepDetachedError
        from airflow_mlpipelines.operators.carrying_out import make_runner

        runner = self._runner = make_runner(self, context)
        try:
            result = runner.run(resumption)
        except LeaseHeldError as error:
            self._wait_for_lease(error)
            raise
        except StepDetachedError as error:
            self._wait_for_pod(error)
            raise
        except (
            StepFailedError,
            EnvironmentBuildError,
            DataError,
            ComputeUnavailableError,
        ) as error:
            failure = {"state": "failed", "reason": str(error).partition("\n")[0]}
            context["ti"].xcom_push(key=STEP_RUN_KEY, value=failure)
            if not error.retryable:
                raise AirflowFailException(str(error)) from error
            raise
        outputs = self._push(context, result)
        if result.state == "reused":
            raise AirflowSkipException(f"Reused: {result.reason}.")
        return (
            outputs or None
        )  # Airflow would push an empty one, too, and each push costs a request

    def resume(self, context: Context, event: dict[str, Any]) -> dict[str, Any] | None:
        """Go on after waiting for whoever was making the same outputs: look again."""
        self.log.info("The step that this one waited for is over: %s", event["reason"])
        return self.execute(context)

    def go_on(
        self, context: Context, event: dict[str, Any], began_at: float
    ) -> dict[str, Any] | None:
        """Go on with a step whose program went on without a worker, as ``event`` says."""
        from airflow_mlpipelines.execution.step import Resumption

        return self._carry_out(context, Resumption(event, began_at))

    def on_kill(self) -> None:
        """End the program, within the seconds that Airflow leaves."""
        if self._runner is not None:
            self._runner.kill()

    def _wait_for_lease(self, error: LeaseHeldError) -> None:
        from airflow_mlpipelines.triggers.lease import LeaseTrigger

        self.log.info("%s; waiting for it without holding a worker slot.", error)
        self.defer(
            trigger=LeaseTrigger(fingerprint=error.fingerprint, poll_seconds=_WAIT_SECONDS),
            method_name=self.resume.__name__,
        )

    def _wait_for_pod(self, error: StepDetachedError) -> None:
        from airflow_mlpipelines.triggers.pod import PodTrigger

        self.defer(
            trigger=PodTrigger(watch=error.watch, lease=error.lease),
            method_name=self.go_on.__name__,
            kwargs={"began_at": error.began_at},
        )

    def _push(self, context: Context, result: StepResult) -> dict[str, Any]:
        ti = context["ti"]
        outputs = {name: artifact.to_dict() for name, artifact in result.outputs.items()}
        for name, artifact in outputs.items():
            ti.xcom_push(key=name, value=artifact)
        ti.xcom_push(key=STEP_RUN_KEY, value=result.to_dict())
        if result.metrics:
            ti.xcom_push(key=METRICS_KEY, value=dict(result.metrics))
        if (
            result.state == "reused" and outputs
        ):  # a skipped task's return value is not pushed by Airflow
            ti.xcom_push(key="return_value", value=outputs)
        return outputs
