"""The plan of a run that nobody has started."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines import settings

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.definition.pipeline import Pipeline


def plan_pipeline(
    pipeline: Pipeline, parameters: Mapping[str, Any], regenerate: Collection[str]
) -> RunPlan:
    """Return what a run with these parameters would do now. Nothing is stored or started.

    Raises:
        PipelineCheckError: Something is wrong with the pipeline.
        MLPipelinesError: Code, data or an environment can't be read.
    """
    graph = pipeline.graph
    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.execution.planning import plan_run
    from airflow_mlpipelines.operators.connections import metadata_url, open_blobs, open_stores
    from airflow_mlpipelines.storage.stat_cache import StatCache

    return plan_run(
        graph,
        parameters=parameters,
        regenerate=regenerate,
        index=MetadataIndex(metadata_url()),
        stores=open_stores(graph),
        cache=StatCache(settings.stat_cache_file()),
        blobs=open_blobs(),
        snapshot=False,
        emit=lambda line: print(line, file=sys.stderr, flush=True),
    )
