"""Load our code once, in the processes that fork, and not again in each that they fork.

The scheduler forks the tasks of the LocalExecutor, and the dag-processor forks a process for every file.
What they have imported their children find in memory: a step starts about 50 ms of processor time
earlier, one in a container 250 ms, one in a pod 400 ms. And where the metadata database is SQLite, what a
step asks of it is made ready. The plugin registers this module as a listener; ``hookimpl`` makes Airflow
call it.
"""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow.listeners import hookimpl

from airflow_mlpipelines import settings

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

_TASK = "TaskRunnerMarker"
"""The class of the component that Airflow says is starting where that is a task."""
_MODULES = (
    "airflow_mlpipelines.definition.pipeline",
    "airflow_mlpipelines.compiler.render",
    "airflow_mlpipelines.operators.steps",
    "airflow_mlpipelines.operators.carrying_out",
    "airflow_mlpipelines.execution.step",
    "airflow_mlpipelines.sensors.cache",
    "airflow_mlpipelines.sensors.planning",
    "airflow_mlpipelines.sensors.clearing",
    "airflow_mlpipelines.compute.local",
    "sqlalchemy.dialects.sqlite",
    "blake3",
)
_DAEMON_MODULES = (
    "airflow_mlpipelines.compute.docker.launcher",
    "airflow.providers.docker.operators.docker",
)
"""What a step in a container needs besides; the client brings an SSH library with it where there is one."""
_CLUSTER_MODULES = (
    "airflow_mlpipelines.compute.kubernetes.launcher",
    "kubernetes.client",
    "kubernetes.config",
    "requests.utils",
    "websocket",
)
"""What a step in a pod needs besides. The client is a module for each of the API's 700 types."""
_CONNECTION_MODULE = "airflow.providers.cncf.kubernetes.hooks.kubernetes"
_CHOICES = ("auto", "all", "none")


@hookimpl
def on_starting(component: object) -> None:
    """Load what steps and DAG files need, unless ``component`` is a task, of ours or anybody's.

    Airflow does not say yet which of its long-running processes it is; the triggerer needs it least.
    """
    if type(component).__name__ == _TASK:
        return
    choice = _read_choice()
    if choice == "none":
        return
    for name in _MODULES:
        importlib.import_module(name)
    if choice == "all" or _has_daemon():
        _load_extra(_DAEMON_MODULES)
    if choice == "all" or _has_cluster():
        _load_extra(_CLUSTER_MODULES)
    if choice == "all":
        _load_extra((_CONNECTION_MODULE,))
    _rehearse()


def _load_extra(names: Iterable[str]) -> None:
    with suppress(ImportError):  # the extra is not installed
        for name in names:
            importlib.import_module(name)


def _read_choice() -> str:
    from airflow.configuration import conf

    choice = conf.get(settings.CONFIG_SECTION, settings.PRELOAD_OPTION, fallback=_CHOICES[0])
    if choice in _CHOICES:
        return str(choice)
    log.warning(
        "[%s] %s is %r, which is none of %s: %r is taken",
        settings.CONFIG_SECTION,
        settings.PRELOAD_OPTION,
        choice,
        ", ".join(_CHOICES),
        _CHOICES[0],
    )
    return _CHOICES[0]


def _has_daemon() -> bool:
    """Return whether steps find a Docker daemon without being told of one."""
    from airflow_mlpipelines.compute.docker.daemon import DEFAULT_URL

    socket = "/" + DEFAULT_URL.removeprefix("unix://")
    return bool(os.environ.get("DOCKER_HOST")) or os.path.exists(socket)  # noqa: PTH110 - raises nothing


def _has_cluster() -> bool:
    """Return whether steps find a way to a Kubernetes cluster without an Airflow connection."""
    return (
        bool(os.environ.get("KUBECONFIG") or os.environ.get("KUBERNETES_SERVICE_HOST"))
        or os.path.exists(os.path.expanduser("~/.kube/config"))  # noqa: PTH110, PTH111 - raises nothing
    )


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
