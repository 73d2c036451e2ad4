"""The rights of deploy/helm/rbac.yaml on a real cluster, and a way to use it with no others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from kubernetes import client, utils

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.kubernetes.conftest import Cluster

_MANIFESTS = Path(__file__).parents[3] / "deploy" / "helm" / "rbac.yaml"
_TOKEN_SECONDS = 3600
_CONFLICT = 409


@dataclass
class Token:
    """What an account shows the API server, for as long as a Secret is there."""

    cluster: Cluster
    text: str
    holder: str

    def revoke(self) -> None:
        """Have the API server refuse it; return when it does."""
        self.cluster.core.delete_namespaced_secret(self.holder, self.cluster.namespace)
        reviews = client.AuthenticationV1Api(self.cluster.core.api_client)

        def is_refused() -> bool:
            review = reviews.create_token_review({"spec": {"token": self.text}})
            return not review.status.authenticated

        self.cluster.wait_until(is_refused, "the token is refused")


@dataclass
class Account:
    """A service account that the manifest gives rights to."""

    cluster: Cluster
    name: str

    def may(self, resource: str, subresource: str, verb: str) -> bool:
        """Return what the API server says to `kubectl auth can-i` in this account's name.

        As there, a resource's API group comes after it: ``jobs.batch``.
        """
        kind, _, group = resource.partition(".")
        attributes = {
            "namespace": self.cluster.namespace,
            "group": group,
            "resource": kind,
            "subresource": subresource,
            "verb": verb,
        }
        user = f"system:serviceaccount:{self.cluster.namespace}:{self.name}"
        authorization = client.AuthorizationV1Api(self.cluster.core.api_client)
        review = authorization.create_subject_access_review(
            {"spec": {"user": user, "resourceAttributes": attributes}}
        )
        return bool(review.status.allowed)

    def make_token(self) -> Token:
        """Return a token that can be taken back."""
        core, namespace = self.cluster.core, self.cluster.namespace
        holder = core.create_namespaced_secret(
            namespace, {"metadata": {"generateName": f"{self.name}-"}}
        )
        bound = {
            "apiVersion": "v1",
            "kind": "Secret",
            "name": holder.metadata.name,
            "uid": holder.metadata.uid,
        }
        made = core.create_namespaced_service_account_token(
            self.name, namespace, {"spec": {"boundObjectRef": bound}}
        )
        return Token(self.cluster, made.status.token, holder.metadata.name)

    def write_kubeconfig(self, file: Path) -> None:
        """Write the cluster's kubeconfig with a token of this account in place of its user."""
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())
        request = {"spec": {"expirationSeconds": _TOKEN_SECONDS}}
        made = self.cluster.core.create_namespaced_service_account_token(
            self.name, self.cluster.namespace, request
        )
        for user in config["users"]:
            user["user"] = {"token": made.status.token}
        file.write_text(yaml.safe_dump(config))


def _read_manifests(namespace: str) -> Iterator[dict[str, Any]]:
    """Yield the manifests as they are shipped, but for the namespaces."""
    for manifest in yaml.safe_load_all(_MANIFESTS.read_text()):
        manifest["metadata"]["namespace"] = namespace
        for subject in manifest.get("subjects", ()):
            subject["namespace"] = namespace
        yield manifest


def grant_rights(cluster: Cluster) -> list[Account]:
    """Grant the rights in the cluster's namespace, once for all tests, and return the accounts that have them."""
    names: list[str] = []
    manifests = list(_read_manifests(cluster.namespace))
    for manifest in manifests:
        names += [subject["name"] for subject in manifest.get("subjects", ())]
    manifests += [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}} for name in names
    ]
    for manifest in manifests:
        try:
            cluster.create(manifest)
        except utils.FailToCreateError as error:
            if any(refusal.status != _CONFLICT for refusal in error.api_exceptions):
                raise
    return [Account(cluster, name) for name in names]
