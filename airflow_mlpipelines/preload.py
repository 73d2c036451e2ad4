"""Load our code once, in the processes that fork, and not again in each that they fork.

The scheduler forks the tasks of the LocalExecutor, and the dag-processor forks a process for every file.
What they have imported their children find in memory: a step starts about 50 ms of processor time
earlier. And where the metadata database is SQLite, what a step asks of it is made ready. The plugin registers this module as a listener; ``hookimpl`` makes Airflow call it.
"""

from __future__ import annotations

import importlib
import logging

from airflow.listeners import hookimpl

from airflow_mlpipelines import settings

log = logging.getLogger(__name__)

_TASK = "TaskRunnerMarker"
"""The class of the component that Airflow says is starting where that is a task."""
_MODULES = (
    "airflow_mlpipelines.definition.pipeline",
    "airflow_mlpipelines.compiler.render",
    "airflow_mlpipelines.operators.steps",
    "airflow_mlpipelines.operators.carrying_out",
    "airflow_mlpipelines.sensors.cache",
    "airflow_mlpipelines.sensors.planning",
    "airflow_mlpipelines.sensors.clearing",
    "airflow_mlpipelines.compute.local",
    "sqlalchemy.dialects.sqlite",
)


@hookimpl
def on_starting(component: object) -> None:
    """Load what steps and DAG files need, unless ``component`` is a task, of ours or anybody's.

    Airflow does not say yet which of its long-running processes it is; the triggerer needs it least.
    """
    if type(component).__name__ != _TASK:
        for name in _MODULES:
            importlib.import_module(name)
        _rehearse()


def _rehearse() -> None:
    """Make the database's statements ready where tasks are forked from here, and need no connection for it."""
    from airflow.configuration import conf

    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.exceptions import CacheError
    from airflow_mlpipelines.execution.rehearsal import rehearse_step

    elsewhere = conf.get(settings.CONFIG_SECTION, settings.METADATA_OPTION, fallback="")
    if elsewhere or "LocalExecutor" not in conf.get("core", "executor"):
        return
    try:
        rehearse_step(MetadataIndex(settings.default_metadata_url()))
    except CacheError as error:  # steps are going to say it where people see it
        log.warning("The metadata database can't be made ready: %s", error)
