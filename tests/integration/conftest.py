"""A real Airflow with all of its processes, for the tests of this folder."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A running Airflow with an empty DAG folder; ended afterwards, whatever happens."""
    home = tmp_path_factory.mktemp("airflow")
    with AirflowStack(home, home / "dags") as running:
        yield running


@pytest.fixture(scope="module")
def client(stack):
    """A client for the running Airflow."""
    return AirflowClient(stack.url, username=stack.username, password=stack.password)
