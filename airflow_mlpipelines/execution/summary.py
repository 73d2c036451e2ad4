"""What a run did as a whole, from its plan and the records of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.decision import Decision
from airflow_mlpipelines.caching.index import FAILED, RAN, REUSED, StepRunRecord

if TYPE_CHECKING:
    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.caching.index import MetadataIndex

_SKIPPED = "skipped"


def summarize_run(
    plan: RunPlan, index: MetadataIndex, *, dag_id: str, run_id: str, prefix: str = ""
) -> dict[str, Any]:
    """Return how many steps did what, the time that reuse saved, and the run's outputs so far.

    Args:
        plan: The run's plan.
        index: Where the records of its steps are.
        dag_id: The DAG.
        run_id: The run.
        prefix: What task groups put before the ids of this pipeline's tasks.

    Returns:
        ``{"ran": n, "reused": n, "failed": n, "skipped": n, "seconds_saved": s, "outputs": {name:
        artifact}}``: the outputs are those with a ``pipeline_output_name``, in their JSON form.
    """
    newest: dict[str, StepRunRecord] = {}
    for record in index.find_step_runs(dag_id=dag_id, run_id=run_id, limit=None):
        newest.setdefault(record.task_id, record)
    counts = dict.fromkeys((RAN, REUSED, FAILED, _SKIPPED), 0)
    saved = 0.0
    outputs: dict[str, Any] = {}
    for step_id, decision in plan.steps.items():
        found = newest.get(f"{prefix}{step_id}")
        made = decision.outputs
        if found is not None:
            counts[found.state] += 1
            saved += found.seconds_saved
            made = found.outputs
        elif decision.decision is Decision.REUSE:
            counts[REUSED] += 1
            saved += decision.seconds_saved or 0.0
        else:
            counts[_SKIPPED] += 1
        outputs |= {
            name: made[output].to_dict()
            for name, (owner, output) in plan.offers.items()
            if owner == step_id and output in made
        }
    return {**counts, "seconds_saved": round(saved, 3), "outputs": outputs}
