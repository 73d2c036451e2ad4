"""The plan of tasks: plain data that says every task of a pipeline's DAG. Knows no Airflow.

Check it, print it, compare it: :mod:`airflow_mlpipelines.compiler.render` only transcribes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import ComputeSpec, PipelineGraph, StepSpec

CACHE_SENSOR = "cache_sensor"
FINISH = "finish"
CACHE_SENSOR_OPERATOR = "airflow_mlpipelines.sensors.cache:CacheSensor"
FINISH_OPERATOR = "airflow_mlpipelines.operators.finish:FinishOperator"


@dataclass(frozen=True)
class TaskPlan:
    """One task.

    Attributes:
        task_id: Its id, without the prefix of a task group.
        operator: ``module:Class`` of the operator.
        upstream: Ids of the tasks directly before it.
        step: The step that it runs; None for the tasks around the steps.
        arguments: Airflow's own arguments of the operator.
    """

    task_id: str
    operator: str
    upstream: tuple[str, ...]
    step: StepSpec | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def plan_tasks(graph: PipelineGraph, *, wait_for_inputs: bool = False) -> tuple[TaskPlan, ...]:
    """Return every task of the pipeline's DAG, each after those it depends on.

    The first decides for all steps whether they must run; the last is what others chain to. A reused
    step is skipped, and nothing after it may be: so steps have the trigger rule ``none_failed``. What
    stands directly behind the first task also wants one success. So where the first task is skipped,
    because somebody's own DAG took another branch, the pipeline is, and what is chained behind it.
    """
    upstream = {step.id: step.upstream for step in graph.steps}
    has_downstream = frozenset().union(*upstream.values())
    leaves = tuple(step.id for step in graph.steps if step.id not in has_downstream)
    sensing: dict[str, Any] = {"wait_for_inputs": True} if wait_for_inputs else {}
    tasks = [TaskPlan(CACHE_SENSOR, CACHE_SENSOR_OPERATOR, (), None, sensing)]
    tasks += [
        _plan_step(step, upstream[step.id], graph.computes[step.compute]) for step in graph.steps
    ]
    tasks.append(
        TaskPlan(
            FINISH, FINISH_OPERATOR, (CACHE_SENSOR, *leaves), None, {"trigger_rule": _AFTER_SENSOR}
        )
    )
    return tuple(tasks)


_AFTER_STEPS = "none_failed"
_AFTER_SENSOR = "none_failed_min_one_success"


def _plan_step(step: StepSpec, upstream: frozenset[str], compute: ComputeSpec) -> TaskPlan:
    arguments: dict[str, Any] = {"trigger_rule": _AFTER_STEPS if upstream else _AFTER_SENSOR}
    if step.name != step.id:
        arguments["task_display_name"] = step.name
    if step.retries is not None:
        arguments["retries"] = step.retries
    if step.retry_delay_seconds is not None:
        arguments["retry_delay"] = step.retry_delay_seconds
    if compute.max_nodes is not None:
        arguments["pool"] = pool_name(compute.name)
        if compute.type == "kubernetes" and step.distributed is not None:
            # Elsewhere, the nodes of a step are all on one machine.
            arguments["pool_slots"] = step.distributed.nodes
    before = tuple(sorted(upstream)) or (CACHE_SENSOR,)
    return TaskPlan(step.id, step.operator, before, step, arguments)


def pool_name(compute: str) -> str:
    """Return the name of the Airflow pool that holds a compute's ``max_nodes``."""
    return f"mlpipelines_{compute}"
