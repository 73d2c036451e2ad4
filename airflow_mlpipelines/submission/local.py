"""Runs in this process, with Airflow's own ``dag.test()`` and no server."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines import settings
from airflow_mlpipelines.exceptions import SubmissionError
from airflow_mlpipelines.submission.run import PipelineRun

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from airflow.sdk import DAG

    from airflow_mlpipelines.definition.pipeline import Pipeline

_XCOM_BACKEND = "airflow_mlpipelines.xcom.DataReferenceXComBackend"
_BUNDLE = "dags-folder"


def settle_airflow() -> Path:
    """Give Airflow its settings for runs in this process; return where its database is to be.

    Airflow reads them when it is first imported, which a DAG file does: so this comes before it is loaded.

    Raises:
        SubmissionError: Airflow was imported before, with settings that do not fit.
    """
    home = settings.home() / "embedded"
    dags = home / "dags"
    dags.mkdir(parents=True, exist_ok=True)
    wanted = {
        "AIRFLOW__CORE__XCOM_BACKEND": _XCOM_BACKEND,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        # dag.test() reads every file of the DAG folder before it starts.
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__LOGGING__LOGGING_LEVEL": os.environ.get(
            "AIRFLOW__LOGGING__LOGGING_LEVEL", "WARNING"
        ),
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        settings.ECHO_VARIABLE: "1",
    }
    if "airflow.configuration" in sys.modules:
        _check_settings(wanted)
    os.environ.update(wanted)
    warnings.filterwarnings("ignore", message=".*starlette.testclient.*")  # Airflow's own affair
    return home


def prepare_airflow() -> None:
    """Make Airflow ready for runs in this process: its settings, and its database.

    The database is SQLite below ``$AIRFLOW_HOME/mlpipelines``, apart from that of an Airflow whose home
    this may be; it is made when it is not there.

    Raises:
        SubmissionError: Airflow was imported before, with settings that do not fit.
    """
    _make_database(settle_airflow())


def _check_settings(wanted: Mapping[str, str]) -> None:
    from airflow.configuration import conf

    backend = conf.get("core", "xcom_backend")
    if backend != wanted["AIRFLOW__CORE__XCOM_BACKEND"] or os.environ.get(
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
    ) not in (wanted["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"],):
        raise SubmissionError(
            "Airflow was imported before the run was submitted, with other settings. Import airflow after "
            "submitting, or not at all, or use `mlpipelines run FILE`."
        )


def _make_database(home: Path) -> None:
    from filelock import FileLock

    ready = home / "database-ready"
    version = _airflow_version()
    if ready.is_file() and ready.read_text() == version:
        return
    with FileLock(home / "database.lock"):
        if ready.is_file() and ready.read_text() == version:
            return
        from airflow.utils.db import initdb

        initdb()
        ready.write_text(version)


def _airflow_version() -> str:
    from importlib.metadata import version

    return version("apache-airflow-core")


class LocalRun:
    """The facts of one run of this process, read from its database."""

    def __init__(self, dag_id: str, run_id: str) -> None:
        self.dag_id = dag_id
        self.run_id = run_id

    def get_state(self) -> str:
        """Return Airflow's state of the run."""
        from airflow.models.dagrun import DagRun  # noqa: TID251 - there is no server to ask
        from sqlalchemy import select

        return str(self._read(select(DagRun.state).where(*self._is_ours(DagRun)))[0][0])

    def list_tasks(self) -> list[dict[str, Any]]:
        """Return each task's id, state and duration."""
        from airflow.models.taskinstance import TaskInstance  # noqa: TID251 - there is no server to ask
        from sqlalchemy import select

        columns = (TaskInstance.task_id, TaskInstance.state, TaskInstance.duration)
        rows = self._read(select(*columns).where(*self._is_ours(TaskInstance)))
        return [{"task_id": row[0], "state": row[1], "duration": row[2]} for row in rows]

    def find_xcom(self, task_id: str, key: str) -> Any | None:
        """Return an XCom's value as it is stored, or None."""
        from airflow.models.xcom import XComModel  # noqa: TID251 - there is no server to ask
        from sqlalchemy import select

        rows = self._read(
            select(XComModel.value).where(
                *self._is_ours(XComModel), XComModel.task_id == task_id, XComModel.key == key
            )
        )
        return rows[0][0] if rows else None

    def get_log(self, task_id: str, try_number: int) -> list[str]:
        """Return nothing: a run of this process writes its log to the terminal."""
        del task_id, try_number
        return []

    def cancel(self) -> None:
        """Do nothing: a run of this process is over by the time that somebody holds it."""

    def _is_ours(self, model: Any) -> tuple[Any, Any]:
        return model.dag_id == self.dag_id, model.run_id == self.run_id

    def _read(self, query: Any) -> list[Any]:
        from airflow.utils.session import create_session

        with create_session() as session:
            return list(session.execute(query).all())


def run_in_process(
    pipeline: Pipeline, conf: Mapping[str, Any], *, experiment: str = ""
) -> PipelineRun:
    """Run a pipeline in this process, to its end; return the run.

    Raises:
        PipelineCheckError: Something is wrong with the pipeline.
        SubmissionError: Airflow can't be made ready here, or refuses a parameter.
    """
    graph = pipeline.graph
    prepare_airflow()
    from airflow.exceptions import ParamValidationError

    dag = pipeline.to_dag(dag_id=pipeline.dag_id)
    _register(dag)
    try:
        run = dag.test(run_conf=dict(conf), logical_date=None)
    except (ParamValidationError, ValueError) as error:
        raise SubmissionError(f"pipeline {pipeline.name!r}: {error}") from error
    return PipelineRun(graph, LocalRun(run.dag_id, run.run_id), experiment=experiment)


def _register(dag: DAG) -> None:
    """Make the DAG known to the database: ``dag.test()`` runs only what a bundle has."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.collection import update_dag_parsing_results_in_db
    from airflow.serialization.serialized_objects import LazyDeserializedDAG
    from airflow.utils.session import create_session

    DagBundlesManager().sync_bundles_to_db()
    with create_session() as session:
        update_dag_parsing_results_in_db(
            _BUNDLE, None, [LazyDeserializedDAG.from_dag(dag)], {}, None, set(), session
        )
