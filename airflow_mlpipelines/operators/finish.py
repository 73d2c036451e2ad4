"""The last task of a pipeline: what other tasks are chained to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlpipelines.definition.graph import PipelineGraph

_FINISH_TASK = "finish"


class FinishOperator(BaseOperator):
    """Succeeds once every step has run or was reused; the run fails without it if a step failed.

    It starts no process: the scheduler itself sees to it, as with Airflow's EmptyOperator. What the
    run did as a whole is its ``return_value`` all the same, made when a task pulls it, by
    :class:`~airflow_mlpipelines.xcom.DataReferenceXComBackend`; see
    :func:`~airflow_mlpipelines.execution.summary.summarize_run` for its form.
    """

    ui_color = "#eef3ee"
    custom_operator_name = "Finish"
    inherits_from_empty_operator = True

    def __init__(self, *, graph: PipelineGraph, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.graph = graph

    def execute(self, context: Context) -> dict[str, Any]:
        """Return the run's summary: where callbacks or outlets make Airflow start a process for it."""
        from airflow_mlpipelines.caching.index import MetadataIndex
        from airflow_mlpipelines.execution.summary import summarize_run
        from airflow_mlpipelines.operators.carrying_out import find_plan
        from airflow_mlpipelines.operators.connections import metadata_url

        ti = context["ti"]
        prefix = self.task_id[: -len(_FINISH_TASK)]
        index = MetadataIndex(metadata_url())
        plan = find_plan(index, ti, prefix)
        summary = summarize_run(plan, index, dag_id=ti.dag_id, run_id=ti.run_id, prefix=prefix)
        self.log.info(
            "%s steps ran, %s were reused, %s were skipped. Reuse saved %.1f s of work.",
            summary["ran"],
            summary["reused"],
            summary["skipped"],
            summary["seconds_saved"],
        )
        return summary
