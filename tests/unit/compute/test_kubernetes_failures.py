"""What a user is told of a pod that does not start, or ends badly: what a real cluster does too seldom to wait for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
from airflow_mlpipelines.compute.kubernetes.failures import PodLostError, end_failure, lost_pod
from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
from airflow_mlpipelines.compute.kubernetes.refusals import find_shortage, refusal
from airflow_mlpipelines.compute.kubernetes.scripts import NO_CONTACT
from airflow_mlpipelines.compute.kubernetes.starting import StartErrors, start_failure
from airflow_mlpipelines.compute.kubernetes.watch import PodEnd
from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

COMPUTE = KubernetesComputeSpec(name="cluster", namespace="ml")
DIGEST = "sha256:4031f3ab4011d2c940359401bd4038e53af02efa4032fe9c4bdd42401f403401"
PULL = f'failed to pull and unpack image "reg.io/denied/train@{DIGEST}": failed to resolve reference "reg.io/x": '


def make_spec(**manifest: Any) -> PodSpec:
    return PodSpec(
        name="mlp-1",
        step_run_id="mlp-1",
        image_name="train:1",
        argv=("python3",),
        uid=1000,
        gid=1000,
        memory=None,
        gpus=0,
        secrets={},
        manifest={"spec": manifest},
    )


def make_pod(
    stage: dict[str, Any] | None = None, step: dict[str, Any] | None = None, **status: Any
) -> dict[str, Any]:
    waiting: dict[str, Any] = {"waiting": {}}
    return {
        "metadata": {"name": "mlp-1", "uid": "u"},
        "spec": {
            "initContainers": [{"name": "stage", "image": "busybox:1.36"}],
            "containers": [{"name": "step", "image": f"reg.io/denied/train@{DIGEST}"}],
        },
        "status": {
            "initContainerStatuses": [{"name": "stage", "state": stage or waiting}],
            "containerStatuses": [{"name": "step", "state": step or waiting}],
            **status,
        },
    }


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return make_pod(
        {"terminated": {"exitCode": 0}}, {"waiting": {"reason": reason, "message": message}}
    )


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- evictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 9Mi. Container step was "
        "using 3Gi, request is 0, has larger consumption of ephemeral-storage. ",
        "The node was low on resource: memory. Threshold quantity: 200Mi, available: 9Mi. ",
        "The node had condition: [DiskPressure]. ",
    ],
)
def test_what_the_node_lacks_is_not_the_programs_fault(message: str) -> None:
    error = lost_pod(
        "train", make_pod(phase="Failed", reason="Evicted", message=message), before_start=False
    )
    assert isinstance(error, PodLostError)
    assert error.retryable
    assert "not to blame" in str(error)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            'Container step exceeded its local ephemeral storage limit "8Mi". ',
            r"it wrote more to disk than its limit of 8Mi\. Raise the compute's ephemeral_storage",
        ),
        (
            "Pod ephemeral local storage usage exceeds the total limit of containers 1500Mi. ",
            r"the limit of 1500Mi that they have together\. Raise the compute's ephemeral_storage",
        ),
        (
            'Usage of EmptyDir volume "scratch" exceeds the limit "2Gi". ',
            r"the volume 'scratch' than its sizeLimit of 2Gi\. Raise that in the compute's pod_template_file",
        ),
        (
            'Usage of EmptyDir volume "mlp-shm" exceeds the limit "1Gi". ',
            r"/dev/shm than its 1Gi\. Raise shm_size",
        ),
    ],
)
def test_a_limit_of_its_own_is_named_and_not_met_again(message: str, told: str) -> None:
    pod = make_pod(phase="Failed", reason="Evicted", message=message)
    with pytest.raises(StepFailedError, match=told) as caught:
        raise lost_pod("train", pod, before_start=False)
    assert not isinstance(caught.value, PodLostError)
    assert not caught.value.retryable


# ---- what keeps a pod from starting -----------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        PULL + "reg.io/train: not found",
        PULL + "unexpected status from HEAD request to https://reg.io/v2: 401 Unauthorized",
        PULL + "failed to authorize: failed to fetch anonymous token: unexpected status: 403 Forbidden",
        "pull access denied, repository does not exist or may require authorization",
        "reading manifest 1 in reg.io/train: StatusCode: 404, <html>",
        "Error response from daemon: manifest unknown: manifest unknown",
    ],
)  # fmt: skip
def test_an_image_that_a_registry_denies_is_told_at_once(said: str) -> None:
    pod = waiting("ErrImagePull", said)
    assert StartErrors(Clock()).is_hopeless(pod, 1.0)
    error = start_failure("train", pod, make_spec(), COMPUTE)
    assert isinstance(error, StepFailedError)
    assert not error.retryable
    assert "image_pull_secrets" in str(error)


@pytest.mark.parametrize(
    "said",
    [
        PULL + 'failed to do request: Head "https://reg.io/v2/denied/manifests/x": dial tcp: connection refused',
        PULL + "unexpected status from HEAD request to https://reg.io/v2/403: 503 Service Unavailable",
        PULL + "failed to copy: read tcp 10.0.0.401:4031: connection reset by peer",
        f"Back-off pulling image reg.io/denied/train@{DIGEST}",
        "",
    ],
)  # fmt: skip
def test_a_registry_that_is_away_gets_time_whatever_the_images_name_says(said: str) -> None:
    clock = Clock()
    errors = StartErrors(clock)
    pod = waiting("ImagePullBackOff", said)
    assert not errors.is_hopeless(pod, 5.0)
    clock.now += 119
    assert not errors.is_hopeless(pod, 124.0)
    clock.now += 2
    assert errors.is_hopeless(pod, 126.0)
    assert isinstance(start_failure("train", pod, make_spec(), COMPUTE), ComputeUnavailableError)


def test_a_large_image_that_breaks_off_gets_as_long_again() -> None:
    clock = Clock()
    errors = StartErrors(clock)
    pod = waiting("ErrImagePull", PULL + "connection reset by peer")
    assert not errors.is_hopeless(waiting("ContainerCreating"), 100.0)
    assert not errors.is_hopeless(pod, 900.0)  # the first that is seen of it
    clock.now += 890
    assert not errors.is_hopeless(pod, 1790.0)
    clock.now += 20
    assert errors.is_hopeless(pod, 1810.0)


def test_an_error_that_has_passed_is_forgotten() -> None:
    clock = Clock()
    errors = StartErrors(clock)
    pod = waiting("ErrImagePull", PULL + "connection reset by peer")
    assert not errors.is_hopeless(pod, 10.0)
    clock.now += 100
    assert not errors.is_hopeless(waiting("PodInitializing"), 110.0)
    clock.now += 100
    assert not errors.is_hopeless(pod, 10.0)
    clock.now += 100
    assert not errors.is_hopeless(pod, 110.0)


@pytest.mark.parametrize(
    ("reason", "said", "seconds", "is_final"),
    [
        ("CreateContainerConfigError", 'configmap "settings" not found', 30, True),
        ("CreateContainerConfigError", "couldn't find key x in ConfigMap ml/settings", 30, True),
        ("CreateContainerConfigError", "failed to sync configmap cache: timed out", 300, False),
        ("CreateContainerError", "context deadline exceeded", 300, False),
        ("CreateContainerError", 'name "step_mlp-1" is reserved for "ab12"', 300, False),
    ],
)  # fmt: skip
def test_only_what_the_definition_gets_wrong_is_final(
    reason: str, said: str, seconds: float, is_final: bool
) -> None:
    clock = Clock()
    errors = StartErrors(clock)
    pod = waiting(reason, said)
    assert not errors.is_hopeless(pod, 1500.0)
    clock.now += seconds - 1
    assert not errors.is_hopeless(pod, 1500.0)
    clock.now += 2
    assert errors.is_hopeless(pod, 1500.0)
    error = start_failure("train", pod, make_spec(), COMPUTE)
    assert said in str(error)
    assert isinstance(error, StepFailedError if is_final else ComputeUnavailableError)


def test_what_a_trigger_has_given_up_is_not_waited_for_anew() -> None:
    errors = StartErrors(Clock())
    assert errors.is_hopeless(waiting("CreateContainerError", "busy"), math.inf)
    assert not errors.is_hopeless(waiting("PodInitializing"), math.inf)  # it has come right


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"exitCode": 137, "reason": "OOMKilled"}, "killed for want of memory"),
        ({"exitCode": NO_CONTACT, "reason": "Error"}, "for 6 hours, in which no worker came"),
        ({"exitCode": 127, "reason": "Error", "message": "sh: tar"}, r"code 127 \(Error sh: tar\).*have sh, tar and gzip"),
    ],
)  # fmt: skip
def test_why_no_files_were_taken_is_told(facts: dict[str, Any], told: str) -> None:
    with pytest.raises(StepFailedError, match=told):
        raise start_failure("train", make_pod({"terminated": facts}), make_spec(), COMPUTE)


# ---- the end ----------------------------------------------------------------------------------------


def end_with(code: int, reason: str = "Error", **spec: Any) -> PodEnd:
    pod = make_pod(step={"terminated": {"exitCode": code, "reason": reason}})
    pod["spec"] |= spec
    return PodEnd(pod, {"exitCode": code, "reason": reason})


def test_shared_memory_that_may_be_full_is_named() -> None:
    volume = {"name": "mlp-shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(32 << 20)}}
    own = str(end_failure("train", end_with(135, volumes=[volume]), make_spec(), ()))
    assert "killed by SIGBUS" in own
    assert "/dev/shm has 32.0 MiB" in own
    lines = ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.",)
    assert "/dev/shm has 64 MiB" in str(end_failure("train", end_with(1), make_spec(), lines))
    assert "shm" not in str(end_failure("train", end_with(1), make_spec(), ("failed",)))


def test_a_node_without_memory_is_told_from_a_limit() -> None:
    error = end_failure("train", end_with(137, "OOMKilled"), make_spec(), ())
    assert "the step has no limit" in str(error)
    assert isinstance(error, StepFailedError)
    assert error.retryable
    container = {"name": "step", "resources": {"limits": {"memory": "1Gi"}}}
    error = end_failure("train", end_with(137, "OOMKilled", containers=[container]), make_spec(), ())  # fmt: skip
    assert "memory limit of 1.0 GiB, which is not the step's own" in str(error)
    assert isinstance(error, StepFailedError)
    assert not error.retryable


# ---- the API server refuses ---------------------------------------------------------------------------


class Cluster:
    url = "https://cluster"


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        (400, 'admission webhook "rules.io" denied the request: resource limits cannot be empty', "rules do not admit"),
        (403, 'admission webhook "rules.io" denied the request: resource limits cannot be empty', "rules do not admit"),
        (401, 'admission webhook "rules.io" denied the request: no team', "rules do not admit"),
        (403, 'pods "x" is forbidden: User "system:serviceaccount:ml:worker" cannot create resource "pods"', "rbac.yaml"),
        (403, 'pods "x" is forbidden: no PriorityClass with name high was found', "priority_class"),
    ],
)  # fmt: skip
def test_who_refuses_is_told_apart(status: int, said: str, told: str) -> None:
    error = refusal("train", ClusterError(status, said), COMPUTE, Cluster())  # type: ignore[arg-type]
    assert told in str(error)
    assert isinstance(error, StepFailedError)
    assert not error.retryable


@pytest.mark.parametrize(
    ("requested", "limited", "too_large"),
    [
        ("pods=1", "pods=1", None),
        ("pods=1", "pods=0", "pods"),
        ("limits.memory=1Gi,requests.cpu=500m", "limits.memory=1Gi,requests.cpu=1", None),
        ("limits.memory=1Gi,requests.cpu=1500m", "limits.memory=1Gi,requests.cpu=1", "requests.cpu"),
        ("requests.nvidia.com/gpu=8", "requests.nvidia.com/gpu=4", "requests.nvidia.com/gpu"),
    ],
)  # fmt: skip
def test_what_never_fits_a_quota_is_told_from_what_may_later(
    requested: str, limited: str, too_large: str | None
) -> None:
    said = f'pods "x" is forbidden: exceeded quota: small, requested: {requested}, used: {limited}, limited: {limited}'
    shortage = find_shortage(ClusterError(403, said))
    assert shortage is not None
    assert shortage.quota == "small"
    assert shortage.too_large == too_large
