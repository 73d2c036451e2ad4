"""Pods on a node that does not answer: the API server and the controllers are real, the kubelet is the test."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.base import RelaunchError
from airflow_mlpipelines.compute.kubernetes import attending, lifetime, watch
from tests.integration.kubernetes.conftest import nodes_lock
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep, _Running, step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher
    from tests.integration.kubernetes.conftest import Cluster

pytestmark = pytest.mark.kubernetes
__all__ = ["step"]
DONE = {"terminated": {"exitCode": 0}}


@dataclass
class Node:
    """A node without a kubelet; whatever it tells, the test tells."""

    cluster: Cluster
    name: str

    def tell(self, *, ready: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        amounts = {"cpu": "4", "memory": "8Gi", "pods": "20", "ephemeral-storage": "20Gi"}
        condition = {
            "type": "Ready",
            "status": ready,
            "reason": "Told",
            "message": "by a test",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        status = {"capacity": amounts, "allocatable": amounts, "conditions": [condition]}
        self.cluster.core.patch_node_status(self.name, {"status": status})

    def tell_pod(self, pod: str, **status: Any) -> None:
        core, namespace = self.cluster.core, self.cluster.namespace
        core.patch_namespaced_pod_status(pod, namespace, {"status": status})


@pytest.fixture
def node(cluster: Cluster) -> Iterator[Node]:
    made = Node(cluster, f"mlp-test-{uuid.uuid4().hex[:8]}")
    with nodes_lock():
        metadata = {"name": made.name, "labels": {"only-for": made.name}}
        taint = {"key": "only-for", "value": made.name, "effect": "NoSchedule"}
        cluster.core.create_node({"metadata": metadata, "spec": {"taints": [taint]}})
        try:
            made.tell(ready="True")
            yield made
        finally:
            cluster.core.delete_node(made.name)


def on(node: Node, step: PodStep, **fields: Any) -> KubernetesLauncher:
    """Return a launcher for pods that only this node takes, and that leave it soon once it is lost."""
    template = step.root / "pod.yaml"
    template.write_text("kind: Pod\nspec: {terminationGracePeriodSeconds: 1}\n")
    lost = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    return step.launcher(
        node_selector={"only-for": node.name},
        tolerations=(
            {"operator": "Exists", "effect": "NoSchedule"},
            {**lost, "tolerationSeconds": 1},
        ),
        pod_template_file=str(template),
        **fields,
    )


def wait_for_node(step: PodStep, running: _Running) -> str:
    """Return the name of the step's pod once it is on the node."""

    def placed() -> str | None:
        assert running.error is None, running.error
        names = [pod.metadata.name for pod in step.look.pods() if pod.spec.node_name]
        return names[0] if names else None

    return str(wait_until(placed, "the pod is on the node"))


def test_a_node_that_lacks_disk_itself_costs_the_step_nothing(step: PodStep, node: Node) -> None:
    running = _Running(step, "", on(node, step), {})
    node.tell_pod(
        wait_for_node(step, running),
        phase="Failed",
        reason="Evicted",
        message="The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 9Mi. ",
    )
    with pytest.raises(RelaunchError, match=r"Evicted: The node was low on resource.*1 of 5"):
        running.wait()


def test_a_pod_whose_node_is_lost_before_it_began_is_launched_again(
    step: PodStep, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = _Running(step, "", on(node, step), {})
    first = wait_for_node(step, running)
    node.tell(ready="Unknown")
    wait_until(lambda: running.error, "the cluster gives the node up")
    with pytest.raises(RelaunchError, match=r"DeletionByTaintManager.*1 of 5"):
        running.wait()
    # No kubelet says that it has ended: it is taken out of the books, and the next one starts elsewhere.
    assert [pod.metadata.name for pod in step.look.pods()] == [first]
    monkeypatch.setattr(lifetime, "_REMOVAL_SECONDS", 3.0)
    assert step.python("print('elsewhere')") == ["elsewhere"]


def test_a_pod_whose_node_is_lost_while_it_ran_is_launched_again(
    step: PodStep, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOST_SECONDS", 3.0)
    monkeypatch.setattr(lifetime, "_REMOVAL_SECONDS", 3.0)
    monkeypatch.setattr(attending, "deliver", lambda *_: None)  # there is no kubelet to take files
    running = _Running(step, "", on(node, step), {})
    pod = wait_for_node(step, running)
    begun = {"running": {"startedAt": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}}
    stage = {"name": "stage", "image": "x", "imageID": "", "ready": True, "restartCount": 0}
    other = {**stage, "name": "step"}
    node.tell_pod(pod, phase="Pending", initContainerStatuses=[{**stage, "state": begun}])
    time.sleep(1)
    node.tell_pod(
        pod,
        phase="Running",
        initContainerStatuses=[{**stage, "state": DONE}],
        containerStatuses=[{**other, "state": begun}],
    )
    time.sleep(1)
    node.tell(ready="Unknown")
    wait_until(lambda: running.error, "the cluster gives the node up")
    with pytest.raises(RelaunchError, match=r"DeletionByTaintManager.*1 of 5"):
        running.wait()
    monkeypatch.undo()
    step.look.remove()
