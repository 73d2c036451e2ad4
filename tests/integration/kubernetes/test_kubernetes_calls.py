"""Steps on a real cluster whose API server, or whose nodes, are away just when they are needed."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from airflow_mlpipelines.compute.kubernetes import reconnecting
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from tests.integration.kubernetes.gate import Gate
from tests.integration.kubernetes.rights import Token, grant_rights
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep, step

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["step"]
pytestmark = pytest.mark.kubernetes

ON_DEMAND = """
import os, time, uuid
print(uuid.uuid4(), flush=True)
while not os.path.exists("/mlp/run/go"):
    time.sleep(0.05)
open("/mlp/outputs/model", "w").write("made")
"""
"""Goes on when the test says so, and tells by its first line which program it is."""


@pytest.fixture
def gate(step: PodStep, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The only way to the API server."""
    with Gate(step.kubeconfig, step.root / "kubeconfig") as made:
        monkeypatch.setenv("KUBECONFIG", str(step.root / "kubeconfig"))
        yield made


def let_end(step: PodStep) -> None:
    """Let the program end, past the gate, and return when it has."""
    step.look.execute("touch", "/mlp/run/go")
    wait_until(lambda: step.look.step_state().terminated, "the program has ended")


# ---- commands in pods --------------------------------------------------------------------------


def test_outputs_wait_for_a_node_that_takes_no_commands_and_no_timeout_ends_their_pod(
    step: PodStep, gate: Gate
) -> None:
    running = step.start(ON_DEMAND, timeout_seconds=12.0)
    gate.refuse("GET", "/exec", 500, times=math.inf)
    let_end(step)
    time.sleep(13)
    assert running.error is None
    gate.heal()
    running.wait()
    assert (step.root / "outputs" / "model").read_text() == "made"


def test_outputs_that_can_not_be_had_now_are_fetched_by_the_next_try(
    step: PodStep, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnecting, "PATIENCE_SECONDS", 2.0)
    running = step.start(ON_DEMAND)
    gate.refuse("GET", "/exec", 500, times=math.inf)
    let_end(step)
    with pytest.raises(
        ComputeUnavailableError, match=r"nothing got through .*dialing backend.*next try"
    ):
        running.wait()
    first, pod = step.lines, step.look.pod().metadata.uid
    gate.heal()
    retry = step.launcher()
    assert retry.recover(step.name, step.handle)
    assert step.python("", launcher=retry) == first
    assert (step.root / "outputs" / "model").read_text() == "made"
    assert pod


# ---- calls of the API --------------------------------------------------------------------------


def test_what_a_pod_takes_to_be_made_is_asked_for_until_it_is_there(
    step: PodStep, gate: Gate
) -> None:
    gate.lose("POST", "/pods")
    gate.refuse("POST", "/secrets", 429)
    gate.lose("POST", "/secrets")
    gate.refuse("POST", "/secrets", 500)
    program = "import os; print(os.environ['PASSWORD'][::-1])"
    assert step.python(program, secrets={"PASSWORD": "canary"}) == ["yranac"]
    assert gate.were_used()
    assert step.look.secrets() == []


def test_a_pod_is_taken_over_from_a_lost_worker_though_the_api_server_is_not_well(
    step: PodStep, gate: Gate
) -> None:
    running = step.start(ON_DEMAND)
    gate.refuse("PATCH", "/pods/", 429)
    gate.refuse("PATCH", "/pods/", 503)
    gate.lose("PATCH", "/pods/")
    let_end_soon = threading.Timer(3.0, let_end, [step])
    let_end_soon.start()
    step.python("", launcher=step.launcher())
    assert gate.were_used()
    assert (step.root / "outputs" / "model").read_text() == "made"
    with pytest.raises(StepFailedError):
        running.wait()
    let_end_soon.join()


# ---- stopping ----------------------------------------------------------------------------------

SECONDS_OF_AIRFLOW = 5.0
"""Between telling a process to end and ending it."""


@pytest.mark.parametrize("trouble", ["slow", "loses answers"])
def test_a_step_can_be_stopped_though_the_api_server_is_not_well(
    step: PodStep, gate: Gate, trouble: str
) -> None:
    launcher = step.launcher()
    running = step.start("import time; time.sleep(100)", launcher)
    time.sleep(1)
    if trouble == "slow":
        gate.delay = 1.3
    else:
        gate.lose("GET", "/pods/", times=2)
        gate.lose("DELETE", "/pods/")
    began = time.monotonic()
    launcher.kill()
    assert time.monotonic() - began < SECONDS_OF_AIRFLOW
    assert [pod for pod in step.look.pods() if pod.metadata.deletion_timestamp is None] == []
    gate.delay = 0.0
    gate.heal()
    with pytest.raises(StepFailedError, match="killed"):
        running.wait()


# ---- credentials -------------------------------------------------------------------------------


def test_tokens_that_are_replaced_while_a_step_runs_cost_no_try(
    step: PodStep, gate: Gate, cluster: Any
) -> None:
    account = grant_rights(cluster)[0]
    file = step.root / "kubeconfig"

    def put(token: Token) -> Token:
        content = yaml.safe_load(file.read_text())
        content["users"][0]["user"] = {"token": token.text}
        file.write_text(yaml.safe_dump(content))
        return token

    first = put(account.make_token())
    running = step.start(ON_DEMAND)
    second = put(account.make_token())
    first.revoke()
    gate.cut()  # so that the worker has to ask for something
    time.sleep(2)
    second.revoke()
    gate.cut()
    let_end(step)
    assert running.error is None
    put(account.make_token())  # a little late
    running.wait()
    assert (step.root / "outputs" / "model").read_text() == "made"
