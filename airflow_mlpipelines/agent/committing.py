"""After the step: what it made digested and sent to its datastores, once, however often that is asked for."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._units import show_duration, show_size
from airflow_mlpipelines.agent.staging import CONTROL, KEPT_DIRECTORIES
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.file_locks import lock_file
from airflow_mlpipelines.storage.kept import keep_files
from airflow_mlpipelines.storage.placing import check_inside
from airflow_mlpipelines.storage.transfer import commit_output

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from airflow_mlpipelines.agent.job import Job
    from airflow_mlpipelines.storage.stores import StoreSet

_LOCK = "commit.lock"
_COMMITTED = "committed.json"
Json = dict[str, Any]


def commit(
    job: Job, workspace: Path, *, say: Callable[[str], None], with_outputs: bool = True
) -> Json:
    """Return the committed outputs, each one's name with its artifact in the JSON form.

    Whoever asks while another one is at it waits, and gets what that one has made; and so does whoever
    asks later, such as a worker whose connection broke.

    Args:
        job: What to send, and where to.
        workspace: The directory that the pod's containers share.
        say: Takes a line for the step's log.
        with_outputs: False for a step that failed: only ``./outputs`` and ``./logs`` are kept then.

    Raises:
        StoreError: Something can't be sent.
        DataError: An output was not made, or is of the wrong kind.
    """
    control = workspace / CONTROL
    control.mkdir(exist_ok=True)
    with lock_file(control / _LOCK, shared=False):
        record = control / _COMMITTED
        if with_outputs and record.exists():
            known: Json = json.loads(record.read_text(encoding="utf-8"))
            return known
        stores = job.open_stores()
        if job.kept is not None:
            datastore, directory = job.kept
            sources = [workspace / "code" / name for name in KEPT_DIRECTORIES]
            keep_files(stores[datastore], directory, sources)
        if not with_outputs:
            return {}
        made = _commit_outputs(job, stores, workspace, say)
        new = record.with_suffix(".new")
        new.write_text(json.dumps(made), encoding="utf-8")
        new.replace(record)
    return made


def _commit_outputs(
    job: Job, stores: StoreSet, workspace: Path, say: Callable[[str], None]
) -> Json:
    made = {}
    for name, item in job.outputs.items():
        began = time.monotonic()
        try:
            artifact = commit_output(
                stores[item.datastore],
                item.path,
                check_inside(workspace / "outputs" / item.source, workspace / "outputs"),
                step_run=job.step_run,
                expect_directory=item.is_directory,
            )
        except DataError as error:
            raise error.at(f"step {job.step!r}, output {name!r}") from error
        made[name] = artifact.to_dict()
        what = f"{show_size(artifact.size)} in {artifact.files} file(s)"
        took = show_duration(time.monotonic() - began)
        say(f"Output {name!r}: {what} committed to {artifact.uri} in {took}")
    return made
