"""From Airflow's context to what earlier runs have left. Imported when the task executes, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.compute.sites import find_site
from airflow_mlpipelines.execution.janitor import clear_up
from airflow_mlpipelines.operators.connections import metadata_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Context

    from airflow_mlpipelines.definition.graph import PipelineGraph


def clear_up_after_others(graph: PipelineGraph, context: Context) -> int:
    """Remove what step runs that are over have left on the pipeline's computes; return of how many.

    Raises:
        CacheError: The metadata database can't be asked.
    """
    if not any(map(find_site, graph.computes.values())):
        return 0  # not even the database's address is asked for
    ti = context["ti"]

    def find_states(
        dag_id: str, run_ids: list[str], task_ids: list[str]
    ) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = ti.get_task_states(
            dag_id, task_ids=task_ids, run_ids=run_ids
        )
        return found

    return clear_up(graph, MetadataIndex(metadata_url()), find_states)
