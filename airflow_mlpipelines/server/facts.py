"""All that is known of a step run, as plain data: what its page and its JSON say."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.explain import content_digests, find_change
from airflow_mlpipelines.caching.index import RAN, REUSED
from airflow_mlpipelines.runtime.metrics import to_json_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from airflow_mlpipelines.caching.index import MetadataIndex, StepRunRecord
    from airflow_mlpipelines.storage.artifact import Artifact

    Ingredients = Mapping[str, Any]

_DEPTH = 200
"""How many earlier runs of a step are looked at."""
_RUN_DEPTH = 5000
"""How many step runs of one DAG run are looked at."""


def describe_step_run(
    index: MetadataIndex, dag_id: str, run_id: str, task_id: str, *, map_index: int = -1
) -> dict[str, Any] | None:
    """Return what a task instance's newest step run did, in JSON form.

    Values of environment variables and of secrets are not in it: the index has only their digests
    and names.

    Returns:
        None if nothing is known: it has not ended yet, or is no step.

    Raises:
        CacheError: The index can't be asked.
    """
    tries = index.find_step_runs(dag_id=dag_id, run_id=run_id, task_id=task_id)
    chosen = next((run for run in tries if run.map_index == map_index), None)
    if chosen is None:
        return None
    earlier = find_earlier(index, chosen)
    ingredients = _find_ingredients(index, chosen)
    contents = index.get_contents(content_digests(ingredients))
    step = ingredients.get("step") or {}
    code, environment = ingredients.get("code") or "", ingredients.get("environment") or ""
    finished_at: datetime | None = chosen.finished_at  # None where the row was damaged
    return {
        "dag_id": dag_id,
        "run_id": run_id,
        "task_id": task_id,
        "map_index": map_index,
        "try_number": chosen.try_number,
        "pipeline": chosen.pipeline,
        "step": chosen.step,
        "type": step.get("type"),
        "state": chosen.state,
        "reason": chosen.reason,
        "finished_at": finished_at.isoformat() if finished_at is not None else None,
        "seconds": chosen.seconds,
        "seconds_saved": chosen.seconds_saved,
        "step_run": chosen.step_run,
        "made_in": _find_maker(chosen, earlier),
        "fingerprint": chosen.fingerprint,
        "command": describe_command(step) if step else None,
        "parameters": {**(step.get("params") or {}), **(ingredients.get("parameters") or {})},
        "inputs": _describe_inputs(index, chosen, ingredients.get("inputs") or {}),
        "outputs": {name: _describe(item) for name, item in chosen.outputs.items()},
        "metrics": to_json_value(dict(chosen.metrics)),
        "environment": _describe_environment(step, contents.get(environment)),
        "code": contents.get(code),
        "change": _describe_change(index, chosen, earlier),
    }


def find_earlier(index: MetadataIndex, run: StepRunRecord) -> list[StepRunRecord]:
    """Return the earlier runs of a step run's step in its DAG, newest first."""
    runs = index.find_step_runs(dag_id=run.dag_id, step=run.step, limit=_DEPTH)
    return runs[runs.index(run) + 1 :] if run in runs else []


def describe_command(step: Mapping[str, Any]) -> str:
    """Return the command line in a fingerprint's ingredients, with the names of ports for their paths.

    Example:
        >>> describe_command(
        ...     {"script": "a b.py", "arguments": [[["literal", "--out"]], [["output", "table"]]]}
        ... )
        "python 'a b.py' --out {table}"
    """
    words = ["python", step["script"]] if step.get("script") else []
    words += [
        "".join(_spell(kind, text) for kind, text in argument)
        for argument in [*(step.get("command") or []), *(step.get("arguments") or [])]
    ]
    return " ".join(word if word.split() == [word] else shlex.quote(word) for word in words)


def _spell(kind: str, text: str) -> str:
    if kind == "literal":
        return text
    return f"{{parameter:{text}}}" if kind == "parameter" else f"{{{text}}}"


def _find_ingredients(index: MetadataIndex, run: StepRunRecord) -> Ingredients:
    """Return a run's ingredients; of a run that the first task decided, those of what it reused."""
    if run.ingredients is not None:
        return run.ingredients
    if run.fingerprint is None:
        return {}
    entry = index.find_entries([run.fingerprint]).get(run.fingerprint)
    return entry.ingredients if entry is not None else {}


def _find_maker(run: StepRunRecord, earlier: Sequence[StepRunRecord]) -> dict[str, Any] | None:
    """Return the task instance of this DAG whose outputs were reused, if it was one."""
    if run.state != REUSED:
        return None
    for item in earlier:
        if item.state == RAN and item.step_run == run.step_run:
            return {"run_id": item.run_id, "task_id": item.task_id, "map_index": item.map_index}
    return None


def _describe_inputs(
    index: MetadataIndex, run: StepRunRecord, inputs: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return each input's digest with the data of this run that has it.

    A fingerprint knows inputs by their digests alone. Where they were is known of what steps made.
    """
    if not inputs:
        return {}
    made: dict[str, dict[str, Artifact]] = {}
    for other in index.find_step_runs(dag_id=run.dag_id, run_id=run.run_id, limit=_RUN_DEPTH):
        for artifact in other.outputs.values():
            made.setdefault(artifact.digest, {})[artifact.uri] = artifact
    return {
        name: {
            "digest": digest,
            "made_in_this_run": [_describe(item) for item in made.get(digest, {}).values()],
        }
        for name, digest in inputs.items()
    }


def _describe(artifact: Artifact) -> dict[str, Any]:
    return {
        "uri": artifact.uri,
        "digest": artifact.digest,
        "size": artifact.size,
        "files": artifact.files,
        "kind": artifact.kind,
        "media_type": artifact.media_type,
    }


def _describe_environment(
    step: Mapping[str, Any], content: Mapping[str, Any] | None
) -> dict[str, Any]:
    found = content or {}
    names = {*(found.get("variables") or {}), *(step.get("environment_variables") or {})}
    return {
        "kind": found.get("kind"),
        "python": found.get("python"),
        "packages": dict(found.get("packages") or {}),
        "image": found.get("image"),
        "digest": found.get("digest"),
        "variables": sorted(names),
        "secrets": list(step.get("secrets") or []),
    }


def _describe_change(
    index: MetadataIndex, run: StepRunRecord, earlier: Sequence[StepRunRecord]
) -> dict[str, Any] | None:
    nearest, differences = find_change(index, run, earlier)
    if nearest is None:
        return None
    return {
        "run_id": nearest.run_id,
        "task_id": nearest.task_id,
        "map_index": nearest.map_index,
        "differences": differences,
    }
