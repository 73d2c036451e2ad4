"""A real Kubernetes cluster, and pods on it that are gone after their test."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from kubernetes import client, config, utils

from tests.cluster.sharing import (
    BUILD_SECONDS,
    ClusterAccess,
    has_binaries,
    shared_folder,
    use_cluster,
)
from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BUSYBOX = "docker.io/library/busybox:1.36"
PYTHON = "docker.io/library/python:3.11-slim"
GPU = "nvidia.com/gpu"
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give whoever comes first the time to build the cluster's binaries, where that was never done."""
    using = [item for item in items if item.get_closest_marker("kubernetes")]
    if using and not has_binaries():
        for item in using:
            item.add_marker(pytest.mark.timeout(BUILD_SECONDS + 300))


@dataclass
class Cluster:
    """A cluster that answers, and a namespace in it that this test process has for itself.

    ``host_address`` is the address at which pods reach servers of this machine; None where it is not known.
    """

    access: ClusterAccess
    namespace: str
    core: client.CoreV1Api = field(init=False)

    def __post_init__(self) -> None:
        self.core = client.CoreV1Api(config.new_client_from_config(str(self.kubeconfig)))

    @property
    def kubeconfig(self) -> Path:
        return self.access.kubeconfig

    @property
    def host_address(self) -> str | None:
        return self.access.host_address

    def create(self, manifest: dict[str, Any]) -> Any:
        """Create the object in the namespace, whatever its kind, as ``kubectl create`` does; return it."""
        made = utils.create_from_dict(self.core.api_client, manifest, namespace=self.namespace)
        return made[0]

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Return the condition's first true value; fail with the namespace's events if there is none."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(POLL_SECONDS)
        events = self.core.list_namespaced_event(self.namespace).items
        told = "\n".join(f"{event.involved_object.name}: {event.message}" for event in events[-20:])
        raise AssertionError(f"waited {WAIT_SECONDS:g} s in vain until {what}; events:\n{told}")

    def read_pod(self, name: str) -> client.V1Pod:
        return self.core.read_namespaced_pod(name, self.namespace)

    def read_log(self, name: str) -> str:
        # Without this option, releases of the client turn the bytes into the text "b'...'".
        reply = self.core.read_namespaced_pod_log(name, self.namespace, _preload_content=False)
        return str(reply.data.decode())

    def wait_for_phase(self, name: str, *phases: str) -> client.V1Pod:
        """Return the pod once it is in one of the phases, such as ``Succeeded``."""

        def look() -> client.V1Pod | None:
            pod = self.read_pod(name)
            return pod if pod.status.phase in phases else None

        return self.wait_until(look, f"pod {name} is {' or '.join(phases)}")

    def wait_for_condition(self, name: str, kind: str, status: str) -> client.V1PodCondition:
        """Return the pod's condition of this kind, such as ``Ready``, once it has the status."""

        def look() -> client.V1PodCondition | None:
            for condition in self.read_pod(name).status.conditions or ():
                if condition.type == kind and condition.status == status:
                    return condition
            return None

        return self.wait_until(look, f"condition {kind} of pod {name} is {status}")


@dataclass
class Pods:
    """Pods of one test, each with one container named ``main``."""

    cluster: Cluster
    names: list[str] = field(default_factory=list)

    def start(
        self,
        *command: str,
        image: str = BUSYBOX,
        limits: dict[str, str] | None = None,
        labels: dict[str, str] | None = None,
        volumes: tuple[dict[str, Any], ...] = (),
        **container: Any,
    ) -> str:
        """Start a pod and return its name; ``container`` adds fields to its container."""
        name = f"pod-{uuid.uuid4().hex[:10]}"
        main = {
            "name": "main",
            "image": image,
            "imagePullPolicy": "IfNotPresent",
            "command": list(command),
            "resources": {"limits": limits or {}},
            **container,
        }
        spec = {"containers": [main], "restartPolicy": "Never", "volumes": list(volumes)}
        metadata = {"name": name, "labels": labels or {}}
        self.names.append(name)
        self.cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        return name

    def delete(self, name: str) -> None:
        """Have the pod killed, and forget it; it counts until the kubelet has done so."""
        self.names.remove(name)
        self.cluster.core.delete_namespaced_pod(
            name, self.cluster.namespace, grace_period_seconds=1
        )

    def clean(self) -> None:
        for name in list(self.names):
            try:
                self.delete(name)
            except client.ApiException as error:
                if error.status != 404:
                    raise


@pytest.fixture(scope="session")
def cluster_access() -> Iterator[ClusterAccess]:
    """The cluster that all processes of this test session share, or a skip with the reason."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex
    with use_cluster(session[:12]) as access:
        yield access


@pytest.fixture(scope="session")
def cluster(cluster_access: ClusterAccess) -> Iterator[Cluster]:
    """The cluster, with a namespace of this process's own that is gone afterwards."""
    made = Cluster(cluster_access, namespace=f"mlp-tests-{uuid.uuid4().hex[:10]}")
    with made.core.api_client:
        made.core.create_namespace({"metadata": {"name": made.namespace}})
        try:

            def has_account() -> bool:
                found = made.core.list_namespaced_service_account(made.namespace).items
                return any(account.metadata.name == "default" for account in found)

            made.wait_until(has_account, "the namespace has its default service account")
            yield made
        finally:
            made.core.delete_namespace(made.namespace)


@pytest.fixture
def pods(cluster: Cluster) -> Iterator[Pods]:
    made = Pods(cluster)
    try:
        yield made
    finally:
        made.clean()


@pytest.fixture
def gpus(cluster: Cluster) -> Iterator[int]:
    """How many GPUs the cluster's one node has; no other test that takes this fixture runs meanwhile."""
    with nodes_lock():
        nodes = cluster.core.list_node().items
        counts = [int(node.status.allocatable.get(GPU, 0)) for node in nodes]
        if len(counts) != 1 or not counts[0]:
            missing(f"the cluster is not one node with GPUs: its nodes have {counts} of {GPU}")
        yield counts[0]


def nodes_lock() -> FileLock:
    """Return what whoever counts the cluster's nodes, or adds one, has to hold meanwhile."""
    return FileLock(shared_folder() / "gpus.lock")
