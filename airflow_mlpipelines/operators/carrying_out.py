"""From Airflow's context to what carries out a step. Imported when a task executes, not before."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlpipelines import settings
from airflow_mlpipelines.caching.decision import Decision, RunPlan
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.caching.planner import external_key
from airflow_mlpipelines.compute.launchers import make_launcher
from airflow_mlpipelines.definition.graph import ExternalDataSpec, StepOutputRef
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.execution.build_leases import make_build_guard
from airflow_mlpipelines.execution.handles import FileHandle
from airflow_mlpipelines.execution.identity import TaskIdentity
from airflow_mlpipelines.execution.services import Services
from airflow_mlpipelines.operators.connections import (
    metadata_url,
    open_blobs,
    open_stores,
    read_secrets,
)
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.stat_cache import StatCache

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from airflow.sdk import Context
    from airflow.sdk.types import RuntimeTaskInstanceProtocol

    from airflow_mlpipelines.compute.base import Emit, HandleStore
    from airflow_mlpipelines.definition.graph import StepSpec
    from airflow_mlpipelines.execution.step import StepRunner
    from airflow_mlpipelines.operators.base import StepOperator

CACHE_SENSOR_TASK = "cache_sensor"
_HANDLE_KEY = "mlpipelines_launch"


def make_runner(operator: StepOperator, context: Context) -> StepRunner:
    """Return what carries out the operator's step in this task instance.

    Raises:
        AirflowSkipException: A required input was neither made nor reused in this run.
        DataError: The run's plan or an input is missing or malformed.
    """
    ti = context["ti"]
    step, graph = operator.step, operator.graph
    index = MetadataIndex(metadata_url())
    producers = [item.source for item in step.inputs if isinstance(item.source, StepOutputRef)]
    needed = {step.id, *(source.step for source in producers)}
    plan = find_plan(index, ti, operator.prefix, only=needed)
    if step.id not in plan.steps:
        raise DataError(
            f"step {step.name!r} is not in the plan of this run: the DAG changed while it was running. "
            f"Clear the task {operator.prefix}{CACHE_SENSOR_TASK!r} to plan anew."
        )
    map_index = -1 if ti.map_index is None else ti.map_index
    identity = TaskIdentity(
        ti.dag_id, ti.run_id, ti.task_id, map_index, ti.max_tries, ti.try_number
    )
    services = Services(
        index=index,
        stores=open_stores(graph),
        launcher=make_launcher(
            graph.computes[step.compute], build_guard=make_build_guard(index, identity.holder)
        ),
        handle=_make_handle(operator, context, identity),
        emit=_make_emit(operator),
        blobs=open_blobs(),
        secrets=read_secrets(step.name, step.secrets),
        cache=StatCache(settings.stat_cache_file()),
        # Where a person watches the run go on in one process, there is no slot to be freed.
        may_detach=not os.environ.get(settings.ECHO_VARIABLE),
    )
    return operator.runner_class()(
        step,
        graph,
        identity=identity,
        plan=plan,
        inputs=_find_inputs(step, plan, ti, operator.prefix),
        services=services,
        forced=_why_forced(operator, plan, ti),
    )


def _make_emit(operator: StepOperator) -> Emit:
    """Return what takes a step's lines: the task's log, and the terminal of a run in one process."""
    log, name = operator.log, operator.step.name

    def to_log(line: str) -> None:
        log.info("%s", line)

    def to_terminal(line: str) -> None:
        print(f"{name} | {line}", file=sys.stderr, flush=True)  # noqa: T201 - a person is watching

    return to_terminal if os.environ.get(settings.ECHO_VARIABLE) else to_log


def find_plan(
    index: MetadataIndex,
    ti: RuntimeTaskInstanceProtocol,
    prefix: str,
    *,
    only: Collection[str] | None = None,
) -> RunPlan:
    """Return the plan that the run's first task made, with the decisions for all steps or ``only`` some.

    From the metadata database: as an XCom it would go through Airflow's API server for every step.

    Raises:
        AirflowSkipException: That task was skipped, and so the pipeline is: a branch was not taken.
        DataError: There is none.
    """
    task_id = f"{prefix}{CACHE_SENSOR_TASK}"
    data = index.find_plan(ti.dag_id, ti.run_id, task_id)
    if data is None:
        states = ti.get_task_states(ti.dag_id, task_ids=[task_id], run_ids=[ti.run_id])
        if states.get(ti.run_id, {}).get(task_id) == "skipped":
            raise AirflowSkipException(f"{task_id!r} was skipped, and so is this step.")
        raise DataError(
            f"the task {task_id!r} of this run has left no plan. Clear it and the tasks after it."
        )
    return RunPlan.from_dict(data, only=only)


def _why_forced(
    operator: StepOperator, plan: RunPlan, ti: RuntimeTaskInstanceProtocol
) -> str | None:
    """Return why the step runs whatever is remembered, in words, or None.

    A step that the plan reuses is skipped, and a clear counts its earlier tries in: so whatever gets
    here in spite of the one, or with more tries than it was given, was cleared by somebody.
    """
    decision = plan.steps[operator.step.id]
    if decision.decision is Decision.REUSE or ti.max_tries > (operator.retries or 0):
        return "cleared by hand"
    if decision.decision is Decision.RUN and decision.miss is not None and decision.miss.is_forced:
        return decision.reason
    return None


def _find_inputs(
    step: StepSpec, plan: RunPlan, ti: RuntimeTaskInstanceProtocol, prefix: str
) -> dict[str, Artifact | None]:
    """Return what every input holds in this run; None for external data that is not there."""
    inputs: dict[str, Artifact | None] = {}
    made: dict[str, Mapping[str, Artifact]] = {}
    for item in step.inputs:
        source = item.source
        if isinstance(source, ExternalDataSpec):
            inputs[item.name] = plan.external.get(external_key(source))
            continue
        try:
            if source.step not in made:
                made[source.step] = find_outputs(source.step, plan, ti, prefix)
        except DataError as error:
            raise DataError(f"step {step.name!r}, input {item.name!r}: {error}") from error
        if source.output not in made[source.step]:
            raise AirflowSkipException(
                f"Input {item.name!r} was not made in this run: step {source.step!r} was skipped."
            )
        inputs[item.name] = made[source.step][source.output]
    return inputs


def find_outputs(
    step_id: str, plan: RunPlan, ti: RuntimeTaskInstanceProtocol, prefix: str
) -> Mapping[str, Artifact]:
    """Return the outputs of a step in this run: those it pushed, else those that the plan reuses.

    Raises:
        DataError: What it pushed are no artifacts. People and other tasks can edit XComs.
    """
    pushed = ti.xcom_pull(task_ids=f"{prefix}{step_id}")
    if isinstance(pushed, dict):
        return {name: Artifact.from_dict(value) for name, value in pushed.items()}
    return plan.steps[step_id].outputs


def _make_handle(operator: StepOperator, context: Context, identity: TaskIdentity) -> HandleStore:
    if operator.graph.computes[operator.step.compute].type == "local":
        # A process can only be found again on its own machine, so that is where it is noted.
        return FileHandle(settings.work_directory() / f"{identity.step_run_id}.json")
    return TaskStateHandle(context, identity.attempt)


class TaskStateHandle:
    """What was launched, in Airflow's task state store: a retry on another worker finds it.

    Airflow is asked once: while this try lives, nobody else has a say in it.
    """

    def __init__(self, context: Context, attempt: int) -> None:
        self._store = context["task_state_store"]
        self._key = f"{_HANDLE_KEY}:{attempt}"
        self._known: str | None = None

    def get(self) -> dict[str, Any] | None:
        """Return what was launched last, by this try or an earlier one, or None."""
        if self._known is None:
            value = self._store.get(self._key)
            self._known = value if isinstance(value, str) else ""
        return json.loads(self._known) if self._known else None

    def set(self, handle: dict[str, Any] | None) -> None:
        """Remember what was launched, or forget it."""
        text = json.dumps(handle) if handle is not None else ""
        self._known = None  # whether it has arrived is not known if this is interrupted
        self._store.set(self._key, text)
        self._known = text
