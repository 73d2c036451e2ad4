"""What a cluster's rules do with a step's pod: limits, quotas, rights and admission, each a real one."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from airflow_mlpipelines.compute.base import DetachedError
from airflow_mlpipelines.compute.kubernetes import room
from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter
from airflow_mlpipelines.compute.kubernetes.detaching import PodWatch, Reason
from airflow_mlpipelines.definition.graph import ResourcesSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from tests.integration.kubernetes.steps import IMAGE, make_api, own_namespace, wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import (
    MEBIBYTE,
    PodStep,
    _Running,
    step,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kubernetes
__all__ = ["step"]


@pytest.fixture
def namespace(step: PodStep) -> Iterator[str]:
    with own_namespace(step.kubeconfig) as name:
        yield name


def set_quota(step: PodStep, namespace: str, **hard: str) -> None:
    """Give a namespace a quota named ``small``, and return once it counts."""
    api = make_api(step.kubeconfig)
    amounts = {name.replace("_", "."): amount for name, amount in hard.items()}
    quota = {"metadata": {"name": "small"}, "spec": {"hard": amounts}}
    api.create_namespaced_resource_quota(namespace, quota)
    wait_until(
        lambda: api.read_namespaced_resource_quota("small", namespace).status.hard, "it counts"
    )


def set_range(step: PodStep, namespace: str, **limits: Any) -> None:
    limit = {"type": "Container", **limits}
    body = {"metadata": {"name": "usual"}, "spec": {"limits": [limit]}}
    make_api(step.kubeconfig).create_namespaced_limit_range(namespace, body)


def occupy(step: PodStep, namespace: str) -> None:
    """Take up room in a namespace with a pod that waits for a node for ever."""
    body = {
        "metadata": {"name": "busy"},
        "spec": {
            "containers": [{"name": "x", "image": IMAGE}],
            "nodeSelector": {"never": "there"},
        },
    }
    make_api(step.kubeconfig).create_namespaced_pod(namespace, body)


def leave(step: PodStep, namespace: str) -> None:
    make_api(step.kubeconfig).delete_namespaced_pod("busy", namespace, grace_period_seconds=0)


# ---- limits that are not the step's own ---------------------------------------------------------------


def test_out_of_memory_names_a_limit_that_the_namespace_sets(step: PodStep, namespace: str) -> None:
    set_range(step, namespace, default={"memory": "48Mi"}, defaultRequest={"memory": "48Mi"})
    with pytest.raises(
        StepFailedError,
        match=r"memory limit of 48.0 MiB, which is not the step's own: .*LimitRange",
    ) as failure:
        step.python("x = b'x' * (200 << 20)", launcher=step.launcher(namespace=namespace))
    assert not failure.value.retryable


def test_a_limit_above_the_namespaces_range_is_told_with_its_remedy(
    step: PodStep, namespace: str
) -> None:
    set_range(step, namespace, max={"memory": "512Mi"})
    with pytest.raises(
        StepFailedError, match=r"LimitRange of namespace .*maximum memory usage.*Change memory="
    ) as failure:
        step.python(
            "",
            launcher=step.launcher(namespace=namespace),
            resources=ResourcesSpec(memory=1024 * MEBIBYTE),
        )
    assert not failure.value.retryable


# ---- rights and admission ----------------------------------------------------------------------------


def test_a_worker_without_rights_is_told_which_it_needs(
    step: PodStep, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"spec": {"expirationSeconds": 3600}}
    api = make_api(step.kubeconfig)
    made = api.create_namespaced_service_account_token("default", namespace, request)
    config = yaml.safe_load(step.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": made.status.token}
    (step.root / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(step.root / "kubeconfig"))
    with pytest.raises(StepFailedError, match=r"cannot get resource .*rbac.yaml") as failure:
        step.python("", launcher=step.launcher(namespace=namespace))
    assert not failure.value.retryable


@contextmanager
def admission_policy(step: PodStep, namespace: str, expression: str, message: str) -> Iterator[str]:
    """Let a ValidatingAdmissionPolicy decide on the pods of a namespace, and give its name."""
    from kubernetes import client

    api = client.AdmissionregistrationV1Api(make_api(step.kubeconfig).api_client)
    name = f"mlp-test-{uuid.uuid4().hex[:8]}"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}  # fmt: skip
    api.create_validating_admission_policy(
        {
            "metadata": {"name": name},
            "spec": {
                "matchConstraints": {"resourceRules": [rule]},
                "validations": [{"expression": expression, "message": message}],
            },
        }
    )
    only_here = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    api.create_validating_admission_policy_binding(
        {
            "metadata": {"name": name},
            "spec": {
                "policyName": name,
                "validationActions": ["Deny"],
                "matchResources": {"namespaceSelector": only_here},
            },
        }
    )
    try:
        yield name
    finally:
        api.delete_validating_admission_policy_binding(name)
        api.delete_validating_admission_policy(name)


def test_an_admission_policy_is_told_in_its_words_and_not_as_a_missing_right(
    step: PodStep, namespace: str
) -> None:
    from kubernetes.client import ApiException

    api = make_api(step.kubeconfig)
    probe = {
        "metadata": {"name": "probe"},
        "spec": {"containers": [{"name": "x", "image": IMAGE}]},
    }

    def is_in_force() -> bool:
        try:
            api.create_namespaced_pod(namespace, probe, dry_run="All")
        except ApiException as error:
            return error.status == 422
        return False

    rule = "has(object.metadata.labels) && 'team' in object.metadata.labels"
    with admission_policy(step, namespace, rule, "a resource cannot be without a team") as name:
        wait_until(is_in_force, "the policy is in force")
        with pytest.raises(
            StepFailedError, match=rf"rules do not admit its pod: .*{name}.*without a team.*labels"
        ) as failure:
            step.python("", launcher=step.launcher(namespace=namespace))
        assert not failure.value.retryable
        launcher = step.launcher(namespace=namespace, labels={"team": "ml"})
        assert step.python("print(1)", launcher=launcher) == ["1"]


# ---- quotas --------------------------------------------------------------------------------------------


def test_a_quota_that_wants_to_know_what_a_pod_uses_says_how_to_tell_it(
    step: PodStep, namespace: str
) -> None:
    set_quota(step, namespace, limits_memory="4Gi")
    with pytest.raises(
        StepFailedError, match=r"quota 'small'.*must specify limits.memory.*Give the step"
    ) as failure:
        step.python("", launcher=step.launcher(namespace=namespace))
    assert not failure.value.retryable
    memory = ResourcesSpec(memory=64 * MEBIBYTE)
    launcher = step.launcher(namespace=namespace)
    assert step.python("print(1)", launcher=launcher, resources=memory) == ["1"]


def test_what_a_quota_never_grants_is_told_and_not_tried_again(
    step: PodStep, namespace: str
) -> None:
    set_quota(step, namespace, pods="0")
    with pytest.raises(
        StepFailedError, match=r"more than quota 'small' .* grants .*\(pods: 1 of 0\)"
    ) as failure:
        step.python("", launcher=step.launcher(namespace=namespace))
    assert not failure.value.retryable
    assert step.handle.get() is None


def test_room_in_a_quota_is_waited_for_and_told_once(
    step: PodStep, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "airflow_mlpipelines")
    set_quota(step, namespace, pods="1")
    occupy(step, namespace)
    running = _Running(step, "print('ran')", step.launcher(namespace=namespace), {})
    wait_until(lambda: "Waiting for room in quota 'small'" in caplog.text, "it waits")
    time.sleep(3)
    assert running.error is None
    leave(step, namespace)
    running.wait()
    assert step.lines == ["ran"]
    assert caplog.text.count("Waiting for room") == 1
    assert step.handle.get() is None


def test_room_for_a_pods_secret_is_waited_for_too(
    step: PodStep, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "airflow_mlpipelines")
    api = make_api(step.kubeconfig)
    set_quota(step, namespace, secrets="1")
    api.create_namespaced_secret(namespace, {"metadata": {"name": "busy"}})
    running = _Running(step, "print('ran')", step.launcher(namespace=namespace), {})
    wait_until(lambda: "Waiting for room in quota 'small'" in caplog.text, "it waits")
    time.sleep(3)
    assert running.error is None
    api.delete_namespaced_secret("busy", namespace)
    running.wait()
    assert step.lines == ["ran"]
    assert caplog.text.count("Waiting for room") == 1
    assert step.handle.get() is None
    assert api.list_namespaced_secret(namespace).items == []


def test_room_that_does_not_come_in_time_is_told(step: PodStep, namespace: str) -> None:
    set_quota(step, namespace, pods="1")
    occupy(step, namespace)
    launcher = step.launcher(namespace=namespace, schedule_timeout_seconds=2)
    with pytest.raises(
        ComputeUnavailableError, match=r"quota 'small' .* had no room .*schedule_timeout_seconds.*exceeded quota"
    ):  # fmt: skip
        step.python("", launcher=launcher)
    assert step.handle.get() is None


def test_a_step_that_is_stopped_waits_for_no_room(step: PodStep, namespace: str) -> None:
    set_quota(step, namespace, pods="1")
    occupy(step, namespace)
    launcher = step.launcher(namespace=namespace)
    running = _Running(step, "", launcher, {})
    wait_until(step.handle.get, "it waits")
    launcher.kill()
    with pytest.raises(StepFailedError, match="it was killed"):
        running.wait()
    assert [pod.metadata.name for pod in make_api(step.kubeconfig).list_namespaced_pod(namespace).items] == ["busy"]  # fmt: skip


def test_a_long_wait_for_room_holds_no_worker(
    step: PodStep, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_LEFT_SECONDS", (1.0, 1.0))
    set_quota(step, namespace, pods="1")
    occupy(step, namespace)

    def run(news: Any = None) -> list[str]:
        launcher = step.launcher(namespace=namespace, defer_after_seconds=0)
        return step.python("print('ran')", launcher=launcher, detach=True, news=news)

    news = None
    for _ in range(2):
        with pytest.raises(DetachedError) as left:
            run(news)
        watch = PodWatch.from_dict(left.value.watch)
        noted = (step.handle.get() or {})["queued_at"]
        assert watch.pods == {}
        found = asyncio.run(PodAwaiter(watch, print, token="mine").wait())
        assert found.reason is Reason.RETRY
        news = found.to_dict()
    assert (step.handle.get() or {})["queued_at"] == noted  # it is still the same wait
    leave(step, namespace)
    with pytest.raises(DetachedError) as left:
        run(news)  # there is room, and its pod goes on by itself
    assert PodWatch.from_dict(left.value.watch).pods
    assert "queued_at" not in (step.handle.get() or {})
    assert step.python("", launcher=step.launcher(namespace=namespace)) == ["ran"]
