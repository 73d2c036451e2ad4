"""A real Airflow with all of its processes, for the tests of this folder."""

from __future__ import annotations

import os

import pytest

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient

# Read when the driver of gs:// is imported. With it, the driver asks over gRPC what kind of bucket it has, for a minute
# where nobody answers, as an emulator does not.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@pytest.fixture(autouse=True)
def _quick_parts(monkeypatch):
    """Let a part that hangs on a broken connection be sent again after seconds, not minutes."""
    monkeypatch.setattr("airflow_mlpipelines.storage.multipart.SLOWEST", 1 << 20)


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
