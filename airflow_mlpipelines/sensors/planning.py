"""From Airflow's context to the plan of a run. Imported when the task executes, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines import settings
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.definition.graph import REGENERATE_OUTPUTS
from airflow_mlpipelines.execution.planning import plan_run
from airflow_mlpipelines.operators.connections import metadata_url, open_stores
from airflow_mlpipelines.storage.stat_cache import StatCache

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.definition.graph import PipelineGraph


def make_plan(graph: PipelineGraph, context: Context) -> RunPlan:
    """Return the plan of the run that this task instance belongs to."""
    params = context["params"]
    index = MetadataIndex(metadata_url())
    return plan_run(
        graph,
        parameters=dict(params),
        regenerate=list(params.get(REGENERATE_OUTPUTS) or []),
        index=index,
        stores=open_stores(graph),
        cache=StatCache(settings.stat_cache_file()),
    )
