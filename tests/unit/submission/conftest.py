"""A server that stands for Airflow's."""

from __future__ import annotations

import pytest

from tests.unit.submission.airflow_server import AirflowServer


@pytest.fixture
def server():
    """A real HTTP server on this machine that a test tells what to answer."""
    with AirflowServer() as server:
        yield server
