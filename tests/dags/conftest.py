"""What tests that run tasks need: Airflow's metadata database, and a way to run a DAG on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun
    from airflow.sdk import DAG


@pytest.fixture(scope="session")
def airflow_db() -> Path:
    """Return the home of an Airflow whose database has been made.

    The home is the temporary one of ``tests/conftest.py``, so every test of a session (with xdist: of
    a worker process) shares the database. Give each test's DAG an id of its own.
    """
    from airflow.configuration import AIRFLOW_HOME
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.utils.db import initdb

    initdb()
    DagBundlesManager().sync_bundles_to_db()
    return Path(AIRFLOW_HOME)


class RunDag(Protocol):
    """Runs a DAG to its end in this process, with ``dag.test()``."""

    def __call__(self, dag: DAG, conf: dict[str, Any] | None = None) -> DagRun: ...


@pytest.fixture(scope="session")
def run_dag(airflow_db: Path) -> RunDag:
    """Return what runs a DAG that was made in the test itself and lies in no bundle."""

    def run(dag: DAG, conf: dict[str, Any] | None = None) -> DagRun:
        from airflow.dag_processing.collection import update_dag_parsing_results_in_db
        from airflow.serialization.serialized_objects import LazyDeserializedDAG
        from airflow.utils.session import create_session

        with create_session() as session:
            update_dag_parsing_results_in_db(
                "dags-folder", None, [LazyDeserializedDAG.from_dag(dag)], {}, None, set(), session
            )
        return dag.test(run_conf=conf)

    return run
