"""What Airflow's provider discovery is told: valid, found, and in accord with the code."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from airflow_mlpipelines.provider_info import get_provider_info

pytestmark = pytest.mark.airflow


def test_the_provider_info_is_valid_by_airflows_own_schema() -> None:
    import airflow

    schema = json.loads((Path(airflow.__path__[0]) / "provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_airflow_finds_the_provider_and_its_options() -> None:
    from airflow.providers_manager import ProvidersManager

    manager = ProvidersManager()
    assert get_provider_info().items() <= manager.providers["airflow-mlpipelines"].data.items()
    assert "mlpipelines" in dict(manager.provider_configs)["airflow-mlpipelines"]


def test_the_options_have_the_defaults_that_the_code_falls_back_to() -> None:
    from airflow.configuration import conf

    from airflow_mlpipelines.xcom import DEFAULT_THRESHOLD_BYTES

    options = get_provider_info()["config"]["mlpipelines"]["options"]
    assert int(options["xcom_threshold_bytes"]["default"]) == DEFAULT_THRESHOLD_BYTES
    assert conf.getint("mlpipelines", "xcom_threshold_bytes") == DEFAULT_THRESHOLD_BYTES
    assert conf.getboolean("mlpipelines", "allow_pickle") is False


def test_every_module_that_is_named_exists() -> None:
    from importlib.util import find_spec

    info = get_provider_info()
    modules = [
        module
        for kind in ("operators", "sensors", "triggers")
        for entry in info[kind]
        for module in entry["python-modules"]
    ]
    assert [module for module in modules if find_spec(module) is None] == []
