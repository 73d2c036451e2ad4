"""What happened, from the metadata index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.caching.explain import find_change
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.exceptions import DefinitionError
from airflow_mlpipelines.operators.connections import metadata_url

if TYPE_CHECKING:
    from airflow_mlpipelines.caching.index import CacheEntry

_DEPTH = 200


def open_index() -> MetadataIndex:
    """Return the metadata index of this machine's Airflow."""
    return MetadataIndex(metadata_url())


def explain_step(dag_id: str, step: str, run_id: str | None) -> dict[str, Any]:
    """Return what a step did in a run, and what differed from the nearest earlier run of it.

    Raises:
        DefinitionError: Nothing is known of such a step or run.
    """
    index = open_index()
    runs = index.find_step_runs(dag_id=dag_id, step=step, limit=_DEPTH)
    if not runs:
        known = {run.step for run in index.find_step_runs(dag_id=dag_id, limit=_DEPTH)}
        if not known:
            raise DefinitionError(f"nothing is known of DAG {dag_id!r}: no step of it ever ran")
        raise DefinitionError(
            f"nothing is known of step {step!r} of DAG {dag_id!r}; known are {list_options(known)}."
            f"{suggest(step, known)}"
        )
    chosen = next((run for run in runs if run_id is None or run.run_id == run_id), None)
    if chosen is None:
        raise DefinitionError(f"nothing is known of step {step!r} in run {run_id!r} of {dag_id!r}")
    nearest, differences = find_change(index, chosen, runs[runs.index(chosen) + 1 :])
    return {
        "dag_id": dag_id,
        "run_id": chosen.run_id,
        "step": step,
        "state": chosen.state,
        "reason": chosen.reason,
        "seconds": chosen.seconds,
        "seconds_saved": chosen.seconds_saved,
        "fingerprint": chosen.fingerprint,
        "compared_with": nearest.run_id if nearest is not None else None,
        "differences": differences,
    }


def entry_to_dict(entry: CacheEntry) -> dict[str, Any]:
    """Return a cache entry in its JSON form."""
    return {
        "fingerprint": entry.fingerprint,
        "pipeline": entry.pipeline,
        "step": entry.step,
        "step_type": entry.step_type,
        "created_at": entry.created_at.isoformat(),
        "seconds": entry.seconds,
        "writer": entry.writer,
        "step_run": entry.step_run,
        "outputs": {name: item.to_dict() for name, item in entry.outputs.items()},
        "ingredients": dict(entry.ingredients),
    }
