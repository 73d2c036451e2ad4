"""Removing what step runs have left on computes, once nobody comes back for it.

A step removes its own pod. It can't where its worker was killed and there is no retry, or where the cluster did not
answer at its end: so the first task of a run looks after what others have left at the computes of its pipeline.
"""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.launches import Launches
from airflow_mlpipelines.compute.sites import find_site, remove_left
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.caching.launches import LaunchRecord
    from airflow_mlpipelines.definition.graph import ComputeSpec, PipelineGraph

    FindStates = Callable[[str, list[str], list[str]], Mapping[str, Mapping[str, Any]]]

log = logging.getLogger(__name__)

OVER = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})
"""The states in which Airflow has done with a task instance."""
YOUNG_SECONDS = 600.0
"""What was launched more recently is not looked at."""
FORGOTTEN_SECONDS = 7 * 24 * 3600.0
"""After this long, what has ended goes also if Airflow does not know its run any more."""
_MOST = 40
_BUDGET_SECONDS = 20.0


def clear_up(graph: PipelineGraph, index: MetadataIndex, find_states: FindStates) -> int:
    """Remove what step runs that are over have left on the computes of a pipeline; return of how many.

    What bears no word of this metadata database is never touched, nor what may be wanted still. Takes some
    seconds at most, and for a pipeline without such computes nothing.

    Args:
        graph: The pipeline.
        index: Knows what was launched.
        find_states: Takes a DAG's id, runs' ids and tasks' ids, and returns the tasks' states by run: a mapped one's
            as ``<task id>_<map index>``.

    Raises:
        CacheError: The database can't be asked.
    """
    computes = [
        (site, compute)
        for compute in graph.computes.values()
        if (site := find_site(compute)) is not None
    ]
    if not computes:
        return 0
    launches = Launches(index)
    records = launches.list_all()
    newest = {record.task: record.attempt for record in sorted(records, key=lambda it: it.attempt)}
    known = [
        (record, compute)
        for record in records
        if record.age > YOUNG_SECONDS and (compute := _find_compute(computes, record)) is not None
    ]
    chosen = random.sample(
        known, min(_MOST, len(known))
    )  # those that can't be removed hold up no others
    states = dict(_find_states([record for record, _ in chosen], find_states))
    deadline = time.monotonic() + _BUDGET_SECONDS
    cleared = 0
    for record, compute in chosen:
        state = states.get(record.step_run)
        is_over = state in OVER or newest[record.task] > record.attempt
        is_forgotten = state is None and record.age > FORGOTTEN_SECONDS
        if not (is_over or is_forgotten):
            continue
        if time.monotonic() > deadline:
            break
        try:
            gone = remove_left(
                compute,
                record.step_run,
                word=record.word,
                nodes=record.nodes,
                only_ended=not is_over,
            )
        except ComputeUnavailableError as error:
            log.warning("What earlier step runs have left can't be removed: %s", error)
            break
        if gone:
            launches.forget(record.step_run)
            cleared += 1
    return cleared


def _find_compute(
    computes: Sequence[tuple[Mapping[str, Any], ComputeSpec]], record: LaunchRecord
) -> ComputeSpec | None:
    return next((compute for site, compute in computes if site == record.site), None)


def _find_states(
    records: Sequence[LaunchRecord], find_states: FindStates
) -> Iterator[tuple[str, str | None]]:
    """Yield each step run with the state of its task instance; None where Airflow knows of none."""
    for dag_id in {record.dag_id for record in records}:
        own = [record for record in records if record.dag_id == dag_id]
        runs = sorted({record.run_id for record in own})
        found = find_states(dag_id, runs, sorted({record.task_id for record in own}))
        for record in own:
            states = found.get(record.run_id, {})
            mapped = f"{record.task_id}_{record.map_index}"
            key = record.task_id if record.map_index < 0 else mapped
            # A task instance that waits to be scheduled has the state None, and is not over.
            state = (states[key] or "none") if key in states else None
            yield record.step_run, state
