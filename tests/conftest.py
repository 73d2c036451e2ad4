"""Settings that must stand before anything imports Airflow: a home of its own, thrown away at the end.

And what a skip means, for all tests.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.parts import fail_if_skipped

if TYPE_CHECKING:
    from collections.abc import Generator

_home = tempfile.mkdtemp(prefix="mlpipelines-tests-")
_owner = os.getpid()


def _remove_home() -> None:
    if os.getpid() == _owner:  # a forked task process ends too, and must not take the home with it
        shutil.rmtree(_home, ignore_errors=True)


atexit.register(_remove_home)

os.environ["AIRFLOW_HOME"] = _home
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
os.environ["AIRFLOW__CORE__UNIT_TEST_MODE"] = "False"
os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = f"{_home}/dags"
os.environ["AIRFLOW__CORE__XCOM_BACKEND"] = "airflow_mlpipelines.xcom.DataReferenceXComBackend"
os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = f"sqlite:///{_home}/airflow.db"
for _name in (
    "MLPIPELINES_CONFIG",
    "MLPIPELINES_HOME",
    "MLPIPELINES_METADATA_URL",
    "AIRFLOW_API_URL",
):
    os.environ.pop(_name, None)
os.makedirs(f"{_home}/dags", exist_ok=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let no test be skipped in CI."""
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let no module be skipped in CI."""
    report = yield
    fail_if_skipped(report)
    return report
