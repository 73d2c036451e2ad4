"""From Airflow's context to the plan of a run. Imported when the task executes, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines import settings
from airflow_mlpipelines.caching.decision import Decision
from airflow_mlpipelines.caching.index import MetadataIndex, StepRunRecord
from airflow_mlpipelines.definition.graph import REGENERATE_ALL, REGENERATE_OUTPUTS
from airflow_mlpipelines.execution.planning import plan_run
from airflow_mlpipelines.operators.connections import metadata_url, open_blobs, open_stores
from airflow_mlpipelines.storage.stat_cache import StatCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from airflow.sdk import Context

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.definition.graph import PipelineGraph


def make_plan(
    graph: PipelineGraph, context: Context, prefix: str, emit: Callable[[str], None]
) -> RunPlan:
    """Return the plan of the run that this task instance belongs to; keep it, and what it reuses."""
    params = context["params"]
    index = MetadataIndex(metadata_url())
    plan = plan_run(
        graph,
        parameters=dict(params),
        regenerate=_own_steps(params.get(REGENERATE_OUTPUTS) or [], prefix),
        index=index,
        stores=open_stores(graph),
        cache=StatCache(settings.stat_cache_file()),
        blobs=open_blobs(),
        emit=emit,
    )
    ti = context["ti"]
    index.put_plan(ti.dag_id, ti.run_id, ti.task_id, plan.to_dict())
    index.record_step_runs(_reused_steps(graph, plan, context, prefix))
    return plan


def _own_steps(tasks: Iterable[str], prefix: str) -> list[str]:
    """Return the ids of this pipeline's steps among tasks of the DAG, which may hold several pipelines."""
    return [
        task if task == REGENERATE_ALL else task.removeprefix(prefix)
        for task in tasks
        if task == REGENERATE_ALL or task.startswith(prefix)
    ]


def _reused_steps(
    graph: PipelineGraph, plan: RunPlan, context: Context, prefix: str
) -> list[StepRunRecord]:
    ti = context["ti"]
    return [
        StepRunRecord(
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            task_id=f"{prefix}{step_id}",
            pipeline=graph.name,
            step=step_id,
            step_run=decision.step_run or "",
            state="reused",
            reason=decision.reason,
            fingerprint=decision.fingerprint,
            outputs=decision.outputs,
            seconds_saved=decision.seconds_saved or 0.0,
        )
        for step_id, decision in plan.steps.items()
        if decision.decision is Decision.REUSE
    ]
