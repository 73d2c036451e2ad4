"""What a run did, from its plan and the XComs of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.decision import Decision
from airflow_mlpipelines.operators.carrying_out import find_outputs, pull_plan

if TYPE_CHECKING:
    from airflow.sdk.types import RuntimeTaskInstanceProtocol

    from airflow_mlpipelines.definition.graph import PipelineGraph


def summarize_run(
    graph: PipelineGraph, ti: RuntimeTaskInstanceProtocol, prefix: str
) -> dict[str, Any]:
    """Return how many steps ran, were reused and were skipped, the time saved, and the outputs."""
    plan = pull_plan(ti, prefix)
    counts = {"ran": 0, "reused": 0, "skipped": 0}
    saved = 0.0
    for step in graph.steps:
        decision = plan.steps[step.id]
        record = None
        if decision.decision is not Decision.REUSE:
            record = ti.xcom_pull(task_ids=f"{prefix}{step.id}", key="step_run")
        if decision.decision is Decision.REUSE:
            counts["reused"] += 1
            saved += decision.seconds_saved or 0.0
        elif isinstance(record, dict):
            counts[record["state"]] += 1
            saved += record.get("seconds_saved") or 0.0
        else:
            counts["skipped"] += 1
    outputs: dict[str, Any] = {}
    for step in graph.steps:
        offered = {
            item.name: item.pipeline_output_name
            for item in step.outputs
            if item.pipeline_output_name
        }
        made = find_outputs(step.id, plan, ti, prefix) if offered else {}
        outputs |= {offered[name]: made[name].to_dict() for name in offered if name in made}
    return {**counts, "seconds_saved": round(saved, 3), "outputs": outputs}
