"""Load our code once, in the processes that fork, and not again in each that they fork.

The scheduler forks the tasks of the LocalExecutor, and the dag-processor forks a process for every file.
What they have imported their children find in memory: a step starts about 50 ms of processor time
earlier. The plugin registers this module as a listener; ``hookimpl`` makes Airflow call it.
"""

from __future__ import annotations

import importlib

from airflow.listeners import hookimpl

_TASK = "TaskRunnerMarker"
"""The class of the component that Airflow says is starting where that is a task."""
_MODULES = (
    "airflow_mlpipelines.definition.pipeline",
    "airflow_mlpipelines.compiler.render",
    "airflow_mlpipelines.operators.steps",
    "airflow_mlpipelines.operators.carrying_out",
    "airflow_mlpipelines.sensors.cache",
    "airflow_mlpipelines.sensors.planning",
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
