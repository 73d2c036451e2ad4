"""Settings that must stand before anything imports Airflow: a home of its own, thrown away at the end."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

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
