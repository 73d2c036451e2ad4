"""Pods of a real cluster that are left to themselves: workers and triggers take turns, without an Airflow around."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from kubernetes import client

from airflow_mlpipelines.compute.base import DetachedError, RelaunchError
from airflow_mlpipelines.compute.kubernetes import packing
from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodNews, PodWatch, Reason
from airflow_mlpipelines.definition.graph import ResourcesSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from tests.integration.kubernetes.steps import IMAGE, Wire, make_api, wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep, step

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["step"]
pytestmark = pytest.mark.kubernetes
GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "kubernetes.md"

COUNT = """
import sys, time
for number in range({count}):
    print("number", number, {text!r}, flush=True)
    time.sleep({pause})
open("/mlp/outputs/model", "w").write("made")
"""


def detach(
    step: PodStep, program: str, *, awaits: Awaited = Awaited.END, **changes: Any
) -> PodWatch:
    """Run a program until its worker leaves it to itself for the reason that a test is about."""
    news = None
    while True:
        with pytest.raises(DetachedError) as detached:
            go_on(step, program, news, **changes)
        watch = PodWatch.from_dict(detached.value.watch)
        if watch.awaits is awaits:
            return watch
        news = wait(step, watch)  # on a slow machine, the pod was not there in time


def finish(step: PodStep, program: str, news: PodNews | None = None, **changes: Any) -> None:
    """Take turns until the step has ended."""
    while True:
        try:
            return go_on(step, program, news, **changes)
        except DetachedError as detached:
            news = wait(step, PodWatch.from_dict(detached.watch))


def go_on(step: PodStep, program: str, news: PodNews | None = None, **changes: Any) -> None:
    """Run it, or go on with it, in one worker."""
    launcher = step.launcher(**{"defer_after_seconds": 1, **changes.pop("compute", {})})
    told = news.to_dict() if news is not None else None
    launch = step.launch("python3", "-c", program, detach=True, news=told, **changes)
    launcher.recover(step.name, step.handle)
    launcher.run(launch, emit=step.lines.append, handle=step.handle)
    assert launcher.release(step.name, step.handle)


def wait(step: PodStep, watch: PodWatch) -> PodNews:
    """Do what a trigger does."""
    awaiter = PodAwaiter(watch, lambda _time, line: step.lines.append(line), token="trigger")
    return asyncio.run(asyncio.wait_for(awaiter.wait(), 120))


def wait_beside(step: PodStep, watch: PodWatch) -> Callable[[], PodNews]:
    """Begin to do what a trigger does; return what gives its news."""
    found: list[PodNews] = []
    thread = threading.Thread(target=lambda: found.append(wait(step, watch)), daemon=True)
    thread.start()

    def join() -> PodNews:
        thread.join(timeout=120)
        return found[0]

    return join


@pytest.fixture
def occupant(step: PodStep, gpus: int) -> Any:
    """Start a pod that takes all GPUs; whatever it is given goes into its ``spec``."""
    api, names = make_api(step.kubeconfig), []

    def start(**spec: Any) -> Callable[[], Any]:
        name = f"occupant-{uuid.uuid4().hex[:8]}"
        names.append(name)
        container = {
            "name": "main",
            "image": IMAGE,
            "command": ["sleep", "300"],
            "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
        }
        body = {"metadata": {"name": name}, "spec": {"containers": [container], **spec}}
        api.create_namespaced_pod(step.namespace, body)

        def is_running() -> bool:
            return api.read_namespaced_pod(name, step.namespace).status.phase == "Running"

        wait_until(is_running, f"{name} runs")
        return lambda: api.delete_namespaced_pod(name, step.namespace, grace_period_seconds=0)

    yield start
    for name in names:
        try:
            api.delete_namespaced_pod(name, step.namespace, grace_period_seconds=0)
        except client.ApiException as error:
            if error.status != 404:
                raise


def test_worker_trigger_and_worker_hand_on_every_line_once(step: PodStep) -> None:
    text = "ü" * 40
    program = COUNT.format(count=600, pause=0.01, text=text)
    options = {"secrets": {"PASSWORD": "canary 4711"}, "compute": {"defer_after_seconds": 4}}
    watch = detach(step, program, **options)
    assert "4711" not in str(watch.to_dict())
    before = len(step.lines)
    news = wait(step, watch)
    meanwhile = len(step.lines)
    finish(step, program, news, **options)
    assert news.reason is Reason.ENDED
    assert step.lines == [f"number {number} {text}" for number in range(600)]
    assert before < meanwhile
    assert (step.root / "outputs" / "model").read_text() == "made"
    assert step.handle.get() is None
    assert step.look.secrets() == []


@pytest.fixture
def large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a step has counts as too large to travel in its pod's Secret."""
    monkeypatch.setattr(packing, "LARGEST", 0)


@pytest.mark.usefixtures("large_files")
def test_a_pod_that_waits_for_a_gpu_gets_its_files_once_it_has_one(
    step: PodStep, occupant: Any, gpus: int
) -> None:
    leave = occupant()
    options: dict[str, Any] = {"resources": ResourcesSpec(gpus=gpus)}
    watch = detach(step, "print('at last')", awaits=Awaited.FILES, **options)
    uid = step.look.pod().metadata.uid
    news_of = wait_beside(step, watch)
    time.sleep(2)
    leave()
    news = news_of()
    assert news.reason is Reason.READY
    finish(step, "print('at last')", news, **options)
    assert step.lines == ["at last"]
    assert watch.pods == {step.look.name: uid}


def test_a_pod_that_waits_for_a_gpu_begins_its_step_without_a_worker(
    step: PodStep, occupant: Any, gpus: int
) -> None:
    leave = occupant()
    options: dict[str, Any] = {"resources": ResourcesSpec(gpus=gpus)}
    with pytest.raises(DetachedError) as detached:
        go_on(step, "print('at last')", **options)
    watch = PodWatch.from_dict(detached.value.watch)
    assert watch.secret == step.look.name
    assert not step.look.is_running()
    uid = step.look.pod().metadata.uid
    # It may begin at any moment, so nothing that it works with is made anew.
    assert step.launcher().recover(step.name, step.handle)
    news_of = wait_beside(step, watch)
    time.sleep(2)
    leave()
    news = news_of()
    assert news.reason is Reason.ENDED
    assert step.lines == ["at last"]
    go_on(step, "print('at last')", news, **options)
    assert step.lines == ["at last"]
    assert watch.pods == {step.look.name: uid}
    assert step.look.secrets() == []


@pytest.mark.parametrize("awaits", [Awaited.FILES, Awaited.END])
def test_a_pod_that_no_node_takes_in_time_fails_in_the_schedulers_words(
    step: PodStep, awaits: Awaited, request: pytest.FixtureRequest
) -> None:
    if awaits is Awaited.FILES:
        request.getfixturevalue("large_files")
    options: dict[str, Any] = {
        "resources": ResourcesSpec(gpus=64),
        "compute": {"schedule_timeout_seconds": 4},
    }
    watch = detach(step, "", awaits=awaits, **options)
    news = wait(step, watch)
    assert news.reason is Reason.UNSCHEDULED
    options["compute"] = {"schedule_timeout_seconds": 4}
    with pytest.raises(ComputeUnavailableError, match=r"Insufficient nvidia.com/gpu"):
        go_on(step, "", news, **options)
    assert step.handle.get() is None


def test_a_preempted_pod_is_told_and_launched_again(
    step: PodStep, occupant: Any, gpus: int
) -> None:
    with client.ApiClient(make_api(step.kubeconfig).api_client.configuration) as connection:
        scheduling = client.SchedulingV1Api(connection)
        name = f"mlp-{uuid.uuid4().hex[:8]}"
        scheduling.create_priority_class({"metadata": {"name": name}, "value": 1000})
        try:
            program = "import time; print('on', flush=True); time.sleep(100)"
            options: dict[str, Any] = {"resources": ResourcesSpec(gpus=gpus)}
            watch = detach(step, program, **options)
            news_of = wait_beside(step, watch)
            leave = occupant(priorityClassName=name)
            news = news_of()
            with pytest.raises(RelaunchError, match=r"\(PreemptionByScheduler.*1 of 5"):
                go_on(step, program, news, **options)
            leave()
            step.lines.clear()
            finish(step, "print('second')", **options)
            assert step.lines == ["second"]
        finally:
            scheduling.delete_priority_class(name)


def test_a_failure_shows_the_end_of_the_log_that_the_trigger_handed_on(step: PodStep) -> None:
    program = "import sys, time\nprint('the cause', flush=True); time.sleep(8); sys.exit(3)"
    news = wait(step, detach(step, program))
    with pytest.raises(StepFailedError, match="exit code 3") as failure:
        go_on(step, program, news)
    assert failure.value.log_tail == ("the cause",)
    assert step.lines == ["the cause"]


def test_a_cut_wire_costs_no_line_and_calls_nobody(
    step: PodStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = COUNT.format(count=300, pause=0.05, text="x")
    watch = detach(step, program)
    other = step.root / "kubeconfig"
    wire = Wire(step.kubeconfig, other)
    monkeypatch.setenv("KUBECONFIG", str(other))
    news_of = wait_beside(step, watch)
    before = len(step.lines)
    wait_until(lambda: len(step.lines) > before + 20, "lines come")
    wire.cut(seconds=3)
    news = news_of()
    finish(step, program, news)
    wire.close()
    assert news.reason is Reason.ENDED
    assert step.lines == [f"number {number} x" for number in range(300)]


def test_the_rights_that_we_ask_for_suffice_and_a_revoked_token_leaves_the_pod_alone(
    step: PodStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_api(step.kubeconfig)
    rbac = client.RbacAuthorizationV1Api(core.api_client)
    name, namespace = f"worker-{uuid.uuid4().hex[:8]}", step.namespace
    documented = re.search(r"(?ms)^(rules:\n.*?)```", GUIDE.read_text())
    assert documented is not None
    rules = yaml.safe_load(documented[1])["rules"]
    core.create_namespaced_service_account(namespace, {"metadata": {"name": name}})
    rbac.create_namespaced_role(namespace, {"metadata": {"name": name}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    binding = {"metadata": {"name": name}, "subjects": [subject], "roleRef": role}
    rbac.create_namespaced_role_binding(namespace, binding)
    token = core.create_namespaced_service_account_token(name, namespace, {"spec": {}})
    own = yaml.safe_load(step.kubeconfig.read_text())
    own["users"][0]["user"] = {"token": token.status.token}
    (step.root / "kubeconfig").write_text(yaml.safe_dump(own))
    monkeypatch.setenv("KUBECONFIG", str(step.root / "kubeconfig"))

    program = COUNT.format(count=40, pause=0.1, text="x")
    finish(step, program, wait(step, detach(step, program, secrets={"A": "b"})), secrets={"A": "b"})
    assert step.lines == [f"number {number} x" for number in range(40)]

    watch = detach(step, program)
    core.delete_namespaced_service_account(name, namespace)
    wait_until(lambda: _is_refused(step), "the API server forgets the token")
    wait_until(lambda: step.look.step_state().terminated, "the step ends")
    with pytest.raises(ComputeUnavailableError, match=r"does not take this worker's credentials"):
        go_on(step, program, PodNews(Reason.UNSEEN, "401", logs=watch.logs))
    monkeypatch.setenv("KUBECONFIG", str(step.kubeconfig))
    step.lines.clear()
    finish(step, program)  # the next try
    assert step.lines == [f"number {number} x" for number in range(40)]


def _is_refused(step: PodStep) -> bool:
    try:
        make_api(step.root / "kubeconfig").list_namespaced_pod(step.namespace)
    except client.ApiException as error:
        return error.status == 401
    return False


def test_a_hundred_triggers_share_a_thread(step: PodStep) -> None:
    program = COUNT.format(count=150, pause=0.05, text="x")
    watch = detach(step, program)
    lines: list[int] = [0] * 100
    lags: list[float] = []

    def count(number: int) -> Any:
        def emit(_time: str, _line: str) -> None:
            lines[number] += 1

        return emit

    async def measure() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.02)
            lags.append(time.monotonic() - began - 0.02)

    async def main() -> list[PodNews]:
        measuring = asyncio.create_task(measure())
        try:
            return await asyncio.gather(
                *(PodAwaiter(watch, count(number)).wait() for number in range(100))
            )
        finally:
            measuring.cancel()

    found = asyncio.run(main())
    assert {news.reason for news in found} == {Reason.ENDED}
    assert set(lines) == {150 - len(step.lines)}
    lags.sort()
    print(f"loop lag: p50 {lags[len(lags) // 2]:.3f} s, p99 {lags[int(len(lags) * 0.99)]:.3f} s")
    finish(step, program, found[0])
