"""The rights of deploy/helm/rbac.yaml, granted on a real cluster: a step runs with them, and nothing more goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from kubernetes import client

from tests.integration.kubernetes.test_kubernetes_launcher import PodStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.kubernetes.conftest import Cluster

pytestmark = pytest.mark.kubernetes

MANIFESTS = Path(__file__).parents[3] / "deploy" / "helm" / "rbac.yaml"
USED = [
    ("pods", "", "create"),
    ("pods", "", "get"),
    ("pods", "", "patch"),
    ("pods", "", "delete"),
    ("pods", "log", "get"),
    ("pods", "exec", "create"),
    ("pods", "exec", "get"),
    ("secrets", "", "create"),
    ("secrets", "", "delete"),
]
REFUSED = [
    ("secrets", "", "get"),
    ("secrets", "", "list"),
    ("pods", "", "deletecollection"),
    ("configmaps", "", "create"),
    ("serviceaccounts", "token", "create"),
]


@dataclass
class Worker:
    """The service account that the manifest gives its rights to."""

    cluster: Cluster
    account: str

    def may(self, resource: str, subresource: str, verb: str) -> bool:
        """Return what the API server says to `kubectl auth can-i` in this account's name."""
        attributes = {
            "namespace": self.cluster.namespace,
            "resource": resource,
            "subresource": subresource,
            "verb": verb,
        }
        user = f"system:serviceaccount:{self.cluster.namespace}:{self.account}"
        authorization = client.AuthorizationV1Api(self.cluster.core.api_client)
        review = authorization.create_subject_access_review(
            {"spec": {"user": user, "resourceAttributes": attributes}}
        )
        return bool(review.status.allowed)

    def write_kubeconfig(self, file: Path) -> None:
        """Write the cluster's kubeconfig with a token of this account in place of its user."""
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())
        request = {"spec": {"expirationSeconds": 600}}
        made = self.cluster.core.create_namespaced_service_account_token(
            self.account, self.cluster.namespace, request
        )
        for user in config["users"]:
            user["user"] = {"token": made.status.token}
        file.write_text(yaml.safe_dump(config))


def read_manifests(namespace: str) -> Iterator[dict[str, Any]]:
    """Yield the manifests as they are shipped, but for the namespaces."""
    for manifest in yaml.safe_load_all(MANIFESTS.read_text()):
        manifest["metadata"]["namespace"] = namespace
        for subject in manifest.get("subjects", ()):
            subject["namespace"] = namespace
        yield manifest


@pytest.fixture(scope="module")
def worker(cluster: Cluster) -> Worker:
    accounts = set()
    for manifest in read_manifests(cluster.namespace):
        accounts |= {subject["name"] for subject in manifest.get("subjects", ())}
        cluster.create(manifest)
    assert len(accounts) == 1
    made = Worker(cluster, accounts.pop())
    cluster.create(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": made.account}}
    )
    return made


def test_the_workers_may_do_what_a_step_takes_and_no_more(worker: Worker) -> None:
    assert [right for right in USED if not worker.may(*right)] == []
    assert [right for right in REFUSED if worker.may(*right)] == []


def test_a_step_runs_with_these_rights(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.write_kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    step = PodStep(tmp_path / "step", worker.cluster.kubeconfig, worker.cluster.namespace)
    try:
        program = "import os; print('the word is', os.environ['WORD'])"
        assert "the word is open" in step.python(program, secrets={"WORD": "open"})
    finally:
        left = step.look.remove()
    assert left == []
