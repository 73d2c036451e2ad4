"""The last task of a pipeline: its summary, and what other tasks are chained to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlpipelines.definition.graph import PipelineGraph

_FINISH_TASK = "finish"


class FinishOperator(BaseOperator):
    """Returns what the run did and offers, once every step has run or was reused.

    Its ``return_value``: ``{"ran": n, "reused": n, "skipped": n, "seconds_saved": s, "outputs":
    {name: artifact}}``, with the outputs that have a ``pipeline_output_name``. It does not run, and
    the run fails, if a step failed.
    """

    ui_color = "#eef3ee"
    custom_operator_name = "Finish"

    def __init__(self, *, graph: PipelineGraph, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.graph = graph

    def execute(self, context: Context) -> dict[str, Any]:
        """Return the run's summary."""
        from airflow_mlpipelines.operators.summary import summarize_run

        prefix = self.task_id[: -len(_FINISH_TASK)]
        summary = summarize_run(self.graph, context["ti"], prefix)
        self.log.info(
            "%s steps ran, %s were reused, %s were skipped. Reuse saved %.1f s of work.",
            summary["ran"],
            summary["reused"],
            summary["skipped"],
            summary["seconds_saved"],
        )
        return summary
