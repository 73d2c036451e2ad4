"""deploy/helm fits together, with the package, and with docker-compose.yml. The chart itself is not at hand here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from airflow_mlpipelines.definition.workspace import Workspace
from airflow_mlpipelines.provider_info import get_provider_info
from airflow_mlpipelines.xcom import DataReferenceXComBackend

ROOT = Path(__file__).parents[2]
SHARED_SETTINGS = {
    ("core", "xcom_backend"),
    ("core", "default_task_retries"),
    ("core", "default_task_retry_delay"),
    ("workers", "max_failed_heartbeats"),
    ("workers", "execution_api_timeout"),
    ("celery_broker_transport_options", "visibility_timeout"),
    ("mlpipelines", "metadata_conn_id"),
}


@pytest.fixture(scope="module")
def values():
    return yaml.safe_load((ROOT / "deploy" / "helm" / "values.yaml").read_text())


@pytest.fixture(scope="module")
def rights():
    return list(yaml.safe_load_all((ROOT / "deploy" / "helm" / "rbac.yaml").read_text()))


@pytest.fixture
def workspace(values, tmp_path):
    made = yaml.safe_load(values["extraConfigMaps"]["mlpipelines-workspace"]["data"])
    [(name, text)] = made.items()
    (tmp_path / name).write_text(text)
    return Workspace.from_config(tmp_path)


def test_the_workspace_is_one_and_is_found(values, workspace):
    assert workspace.default_compute.spec.type == "kubernetes"
    mounts = {mount["name"]: mount["mountPath"] for mount in values["volumeMounts"]}
    variables = {variable["name"]: variable["value"] for variable in values["env"]}
    config_map = values["volumes"][0]["configMap"]["name"]

    assert config_map in values["extraConfigMaps"]
    assert variables["MLPIPELINES_CONFIG"] == f"{mounts[config_map]}/{workspace.config_file.name}"


def test_the_rights_are_for_the_workers_in_the_namespace_of_the_compute(values, rights, workspace):
    role, binding = rights
    accounts = [subject["name"] for subject in binding["subjects"]]

    assert {manifest["metadata"]["namespace"] for manifest in rights} == {
        workspace.default_compute.spec.namespace
    }
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert accounts == [
        values[component]["serviceAccount"]["name"] for component in ("workers", "triggerer")
    ]
    assert values["allowPodLaunching"] is False  # the chart's own, broader rights


def test_the_guide_to_kubernetes_asks_for_the_same_rights(rights):
    guide = (ROOT / "docs" / "guides" / "kubernetes.md").read_text()
    block = re.search(r"```yaml\n(rules:.*?)```", guide, re.DOTALL)

    assert block is not None
    assert yaml.safe_load(block[1])["rules"] == rights[0]["rules"]


def test_airflow_is_set_as_in_the_compose_file(values):
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    environment = compose["x-airflow"]["environment"]
    settings = values["config"]

    for section, option in SHARED_SETTINGS:
        variable = f"AIRFLOW__{section}__{option}".upper()
        assert str(settings[section][option]) == environment[variable], option
    timeout = settings["scheduler"]["task_instance_heartbeat_timeout"]
    assert f":-{timeout}}}" in environment["AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT"]


def test_settings_are_spelt_as_they_are_known(values):
    backend = f"{DataReferenceXComBackend.__module__}.{DataReferenceXComBackend.__qualname__}"

    assert values["config"]["core"]["xcom_backend"] == backend
    known = get_provider_info()["config"]["mlpipelines"]["options"]
    assert values["config"]["mlpipelines"].keys() <= known.keys()
    assert f"apache/airflow:{values['airflowVersion']}-" in (ROOT / "Dockerfile").read_text()
