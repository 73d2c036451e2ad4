"""Workspace files and settings that documents show are ones that this package takes."""

from __future__ import annotations

from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from shutil import copy

import pytest

from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
from airflow_mlpipelines.definition.workspace import Workspace
from airflow_mlpipelines.provider_info import get_provider_info

HERE = Path(__file__).parent / "documents"


@pytest.fixture
def load(tmp_path):
    """Read a document's workspace file as a pipeline does."""

    def load(name: str) -> Workspace:
        copy(HERE / name, tmp_path / "mlpipelines.yaml")
        (tmp_path / "docker").mkdir(exist_ok=True)
        (tmp_path / "docker" / "own.Dockerfile").write_text("FROM python:3.12-slim\n")
        return Workspace.from_config(tmp_path)

    return load


def read_settings(name: str) -> ConfigParser:
    made = ConfigParser()
    made.read(HERE / name)
    return made


def test_the_datastores_of_the_guide_to_data(load):
    stores = {name: each.spec for name, each in load("data.yaml").datastores.items()}

    assert {name: (spec.url, spec.conn_id) for name, spec in stores.items()} == {
        "workspaceblobstore": ("s3://ml/churn", "lake"),
        "partner": ("sftp://files.example.org/exports", "partner_sftp"),
        "prices": ("https://prices.example.org/daily", None),
    }


def test_the_environments_of_the_guide_to_environments(load):
    workspace = load("environments.yaml")

    assert set(workspace.environments) == {"training", "own"}
    cluster = workspace.compute_targets["cluster"].spec
    assert isinstance(cluster, KubernetesComputeSpec)
    assert cluster.image_conn_id == "base_images"

    assert workspace.registry is not None
    assert workspace.registry.url == "registry.example.com/team/env"


def test_the_compute_of_the_guide_to_kubernetes(load):
    spec = load("kubernetes.yaml").compute_targets["cluster"].spec

    assert isinstance(spec, KubernetesComputeSpec)
    assert (spec.conn_id, spec.gpus, spec.schedule_timeout_seconds) == ("my_cluster", 8, 43200)
    assert spec.startup_timeout_seconds == 1800


def test_the_builder_of_the_guide_to_environments(load):
    spec = load("buildkit.yaml").compute_targets["cluster"].spec

    assert isinstance(spec, KubernetesComputeSpec)
    assert (spec.buildkit_host, spec.buildkit_tls) == (
        "tcp://buildkitd.ml.svc:1234",
        "/etc/buildkit",
    )


@pytest.mark.parametrize("name", ["airflow.cfg", "cache.cfg"])
def test_settings_are_known_by_these_names(name):
    made = read_settings(name)

    assert set(made["mlpipelines"]) <= set(get_provider_info()["config"]["mlpipelines"]["options"])


def test_the_xcom_backend_of_the_readme_is_there():
    module, _, name = read_settings("airflow.cfg")["core"]["xcom_backend"].rpartition(".")

    assert hasattr(import_module(module), name)
