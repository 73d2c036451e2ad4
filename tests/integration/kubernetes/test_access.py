"""The ways to a real cluster: an Airflow connection, and what Kubernetes gives to a pod."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes import client, config
from kubernetes.config import incluster_config

from airflow_mlpipelines.exceptions import ComputeUnavailableError
from tests.integration.kubernetes.rights import grant_rights
from tests.integration.kubernetes.test_detached import COUNT, detach, finish, wait
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep, step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["step"]
pytestmark = pytest.mark.kubernetes


@pytest.fixture
def no_kubeconfig(step: PodStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other way to any cluster than the one that a test opens."""
    monkeypatch.setenv("KUBECONFIG", str(step.root / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def run_in_turns(step: PodStep, **compute: Any) -> None:
    """Run a step over two workers and a trigger."""
    options = {"compute": {"in_cluster": None, **compute}, "secrets": {"A": "b"}}
    program = COUNT.format(count=50, pause=0.1, text="x")
    finish(step, program, wait(step, detach(step, program, **options)), **options)
    assert step.lines == [f"number {number} x" for number in range(50)]
    assert (step.root / "outputs" / "model").read_text() == "made"


def name_file(file: Path) -> dict[str, str]:
    return {"kube_config_path": str(file)}


def write_out(file: Path) -> dict[str, str]:
    return {"kube_config": json.dumps(yaml.safe_load(file.read_text()))}


@pytest.mark.usefixtures("no_kubeconfig")
@pytest.mark.parametrize("describe", [name_file, write_out])
def test_an_airflow_connection_is_the_way_of_workers_and_triggers(
    step: PodStep,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    describe: Callable[[Path], dict[str, str]],
) -> None:
    file = step.root / "kubeconfig"
    grant_rights(cluster)[0].write_kubeconfig(file)
    connection = {"conn_type": "kubernetes", "extra": describe(file)}
    monkeypatch.setenv("AIRFLOW_CONN_GPUS", json.dumps(connection))
    run_in_turns(step, conn_id="gpus")


@pytest.mark.usefixtures("no_kubeconfig")
def test_a_connection_that_is_not_there_is_named(step: PodStep) -> None:
    with pytest.raises(ComputeUnavailableError, match=r"compute 'cluster': .*nowhere.*conn_id="):
        step.python("", launcher=step.launcher(conn_id="nowhere", in_cluster=None))


@pytest.mark.usefixtures("no_kubeconfig")
@pytest.mark.parametrize("in_cluster", [True, None])
def test_within_the_cluster_its_service_account_is_the_way_of_workers_and_triggers(
    step: PodStep, cluster: Any, monkeypatch: pytest.MonkeyPatch, in_cluster: bool | None
) -> None:
    known = client.Configuration()
    config.load_kube_config(str(step.kubeconfig), client_configuration=known)
    server = urlsplit(known.host)
    file = step.root / "token"
    file.write_text(grant_rights(cluster)[0].make_token().text)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(file))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", known.ssl_ca_cert)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(server.hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    run_in_turns(step, in_cluster=in_cluster)


def test_what_is_within_no_cluster_says_so(step: PodStep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ComputeUnavailableError, match=r"Service host/port is not set"):
        step.python("", launcher=step.launcher(in_cluster=True))
