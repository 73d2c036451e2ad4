"""Pods that start, do not start, or are ended by a limit, on a real cluster: with what a user is told."""

from __future__ import annotations

import socket
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.kubernetes import following, watch
from airflow_mlpipelines.compute.kubernetes.starting import StartErrors
from airflow_mlpipelines.definition.graph import ResourcesSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import (
    MEBIBYTE,
    PodStep,
    _Running,
    step,
)
from tests.parts import missing

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher
    from tests.integration.kubernetes.conftest import Cluster

pytestmark = pytest.mark.kubernetes
__all__ = ["step"]
PAUSE = "localhost/mlpipelines-pause:1"
"""The image that holds the namespaces of the test cluster's pods: one static program, and nothing else."""


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time that errors get to pass fly, thirty times as fast."""
    monkeypatch.setattr(watch, "_LONGEST_WATCH_SECONDS", 1.0)
    fast = lambda: StartErrors(lambda: 30 * time.monotonic())  # noqa: E731 - where a class is expected
    monkeypatch.setattr(following, "StartErrors", fast)


def with_template(step: PodStep, text: str, **fields: Any) -> KubernetesLauncher:
    template = step.root / "pod.yaml"
    template.write_text("kind: Pod\nspec:\n" + text)
    return step.launcher(pod_template_file=str(template), **fields)


# ---- pods that start -----------------------------------------------------------------------------------


def test_an_image_without_a_shell_or_anything_else_will_do(step: PodStep, cluster: Cluster) -> None:
    if cluster.access.state is None:
        missing("only a cluster that the tests start has an image with one program")
    launcher = step.launcher(image=PAUSE)
    running = _Running(step, "", launcher, {"image": PAUSE, "argv": ("/pause",)})
    wait_until(lambda: step.look.is_running() or running.error, "the program runs")
    statuses = step.look.pod().status.container_statuses
    assert next(each for each in statuses if each.name == "step").image == PAUSE
    launcher.kill()
    with pytest.raises(StepFailedError, match="it was killed"):
        running.wait()


def test_a_program_that_an_image_lacks_is_named(step: PodStep, cluster: Cluster) -> None:
    if cluster.access.state is None:
        missing("only a cluster that the tests start has an image with one program")
    with pytest.raises(StepFailedError, match=rf"'python3' can't be started in the image '{PAUSE}'") as failure:  # fmt: skip
        step.python("", launcher=step.launcher(image=PAUSE), image=PAUSE)
    assert not failure.value.retryable


def test_the_cluster_takes_every_field_that_says_where_and_as_whom(
    step: PodStep, cluster: Cluster
) -> None:
    from kubernetes import client

    scheduling = client.SchedulingV1Api(cluster.core.api_client)
    nodes = client.NodeV1Api(cluster.core.api_client)
    name = f"mlp-test-{uuid.uuid4().hex[:8]}"
    [node] = [
        each.metadata.name
        for each in cluster.core.list_node().items
        if not (each.spec.taints or each.spec.unschedulable)
    ][:1]
    cluster.core.create_namespaced_service_account(step.namespace, {"metadata": {"name": name}})
    scheduling.create_priority_class({"metadata": {"name": name}, "value": 7})
    nodes.create_runtime_class({"metadata": {"name": name}, "handler": "runc"})
    expression = {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [expression]}]
            }
        }
    }
    toleration = {"key": name, "operator": "Exists", "effect": "NoSchedule"}
    launcher = step.launcher(
        service_account=name,
        node_selector={"kubernetes.io/hostname": node},
        tolerations=(toleration,),
        affinity=affinity,
        priority_class=name,
        runtime_class=name,
        queue="training",
    )
    try:
        running = step.start("import time; print('ran'); time.sleep(3)", launcher)
        pod = step.look.pod()
        running.wait()
    finally:
        nodes.delete_runtime_class(name)
        scheduling.delete_priority_class(name)
        cluster.core.delete_namespaced_service_account(name, step.namespace)
    assert step.lines == ["ran"]
    spec = pod.spec
    assert (spec.service_account_name, spec.node_name) == (name, node)
    assert (spec.priority_class_name, spec.priority, spec.runtime_class_name) == (name, 7, name)
    assert name in [each.key for each in spec.tolerations]
    required = spec.affinity.node_affinity.required_during_scheduling_ignored_during_execution
    assert required.node_selector_terms[0].match_expressions[0].values == ["linux"]
    assert pod.metadata.labels["kueue.x-k8s.io/queue-name"] == "training"


def test_a_gpu_type_is_looked_for_by_the_label_that_the_cluster_has_for_it(
    step: PodStep, cluster: Cluster, gpus: int
) -> None:
    [node] = [each.metadata.name for each in cluster.core.list_node().items]
    label = "cloud.google.com/gke-accelerator"
    cluster.core.patch_node(node, {"metadata": {"labels": {label: "nvidia-l4"}}})
    try:
        launcher = step.launcher(gpu_type_label=label, schedule_timeout_seconds=20)
        wanted = ResourcesSpec(gpus=1, gpu_type="nvidia-l4")
        assert step.python("print('ran')", launcher=launcher, resources=wanted) == ["ran"]
    finally:
        cluster.core.patch_node(node, {"metadata": {"labels": {label: None}}})
    assert gpus


# ---- pods that do not -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_impatient")
def test_a_volume_that_can_not_be_mounted_is_told_in_the_clusters_words(step: PodStep) -> None:
    launcher = with_template(
        step,
        "  containers: [{name: base, image: x, volumeMounts: [{name: v, mountPath: /v}]}]\n"
        "  volumes: [{name: v, configMap: {name: nowhere}}]\n",
        startup_timeout_seconds=5,
    )
    with pytest.raises(
        ComputeUnavailableError, match=r"startup_timeout_seconds.*FailedMount.*nowhere.*not found.*pod_template_file"
    ) as failure:  # fmt: skip
        step.python("", launcher=launcher)
    assert "that slowly" not in str(failure.value)
    assert step.handle.get() is None


def test_an_image_that_takes_too_long_is_asked_about(step: PodStep, cluster: Cluster) -> None:
    if cluster.host_address is None:
        missing("this cluster's node can't be told where a server of this machine is")
    with socket.create_server(("0.0.0.0", 0)) as silent:  # it takes calls, and never answers
        image = f"{cluster.host_address}:{silent.getsockname()[1]}/team/train:1"
        launcher = step.launcher(image=image, startup_timeout_seconds=6)
        with pytest.raises(
            ComputeUnavailableError, match=r"startup_timeout_seconds.*image '.*/team/train:1' that slowly\? Then allow"
        ):  # fmt: skip
            step.python("", launcher=launcher, image=image)


@pytest.mark.usefixtures("_impatient")
def test_a_registry_that_is_down_is_not_the_images_fault(step: PodStep) -> None:
    image = "127.0.0.1:1/not-found/train:1"
    with pytest.raises(
        ComputeUnavailableError, match=r"'127.0.0.1:1/not-found/train:1' can't be pulled .*way to the registry"
    ):  # fmt: skip
        step.python("", launcher=step.launcher(image=image), image=image)
    assert step.handle.get() is None


@pytest.mark.usefixtures("_impatient")
def test_a_variable_from_nowhere_is_told_and_not_tried_again(step: PodStep) -> None:
    source = "{configMapKeyRef: {name: nowhere, key: x}}"
    launcher = with_template(
        step, f"  containers: [{{name: base, image: x, env: [{{name: X, valueFrom: {source}}}]}}]\n"
    )
    with pytest.raises(
        StepFailedError, match=r"CreateContainerConfigError: .*nowhere.*not found.*pod_template_file"
    ) as failure:  # fmt: skip
        step.python("", launcher=launcher)
    assert not failure.value.retryable


# ---- pods that a limit ends ---------------------------------------------------------------------------


def test_a_deadline_of_the_pod_is_not_told_as_the_clusters_whim(step: PodStep) -> None:
    launcher = with_template(
        step, "  activeDeadlineSeconds: 6\n  terminationGracePeriodSeconds: 1\n"
    )
    with pytest.raises(
        StepFailedError, match=r"longer than 6.0 s \(activeDeadlineSeconds: .*Allow more time"
    ) as failure:
        step.python("import time; time.sleep(60)", launcher=launcher)
    assert "not to blame" not in str(failure.value)


def test_shared_memory_that_is_full_is_named(step: PodStep) -> None:
    program = (
        "import mmap\n"
        "file = open('/dev/shm/x', 'w+b'); file.truncate(8 << 20)\n"
        "mmap.mmap(file.fileno(), 8 << 20).write(b'x' * (8 << 20))\n"
    )
    with pytest.raises(
        StepFailedError, match=r"SIGBUS.*/dev/shm has 1.0 MiB.*raise shm_size="
    ) as failure:
        step.python(program, resources=ResourcesSpec(shm_size=MEBIBYTE))
    assert failure.value.exit_code == 135


def test_disks_that_are_filled_are_told_by_the_limit_that_was_met(
    step: PodStep, cluster: Cluster
) -> None:
    other = PodStep(step.root.parent / "other", cluster.kubeconfig, cluster.namespace)
    write = "import time; open('{}', 'wb').write(bytes(600 << 20)); time.sleep(200)"
    whole = _Running(
        step, write.format("/mlp/outputs/model"), step.launcher(ephemeral_storage=8 * MEBIBYTE), {}
    )
    launcher = with_template(
        other,
        "  containers: [{name: base, image: x, volumeMounts: [{name: scratch, mountPath: /scratch}]}]\n"
        "  volumes: [{name: scratch, emptyDir: {sizeLimit: 8Mi}}]\n",
    )
    volume = _Running(other, write.format("/scratch/x"), launcher, {})
    try:
        # The kubelet looks how much there is on its disk once in a minute.
        wait_until(lambda: whole.error and volume.error, "both were evicted", seconds=200)
        with pytest.raises(StepFailedError, match=r"Raise the compute's ephemeral_storage") as pod:
            whole.wait()
        with pytest.raises(
            StepFailedError, match=r"volume 'scratch' than its sizeLimit of 8Mi"
        ) as one:
            volume.wait()
    finally:
        other.look.remove()
    assert not pod.value.retryable
    assert not one.value.retryable


def test_what_a_step_is_refused_for_is_not_what_others_are(step: PodStep) -> None:
    with pytest.raises(StepFailedError, match=r"serviceaccount \"nobody\" not found.*service_account"):  # fmt: skip
        step.python("", launcher=step.launcher(service_account="nobody"))
