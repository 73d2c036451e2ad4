"""Steps on a real cluster whose API server, or whose nodes, are away just when they are needed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.kubernetes import reconnecting
from airflow_mlpipelines.exceptions import ComputeUnavailableError
from tests.integration.kubernetes.steps import Wire, wait_until
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
def wire(step: PodStep, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The only way to the API server."""
    made = Wire(step.kubeconfig, step.root / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(step.root / "kubeconfig"))
    try:
        yield made
    finally:
        made.close()


def let_end(step: PodStep) -> None:
    """Let the program end, past the wire, and return when it has."""
    step.look.execute("touch", "/mlp/run/go")
    wait_until(lambda: step.look.step_state().terminated, "the program has ended")


# ---- commands in pods --------------------------------------------------------------------------


def test_outputs_wait_for_a_node_that_takes_no_commands_and_no_timeout_ends_their_pod(
    step: PodStep, wire: Wire
) -> None:
    running = step.start(ON_DEMAND, timeout_seconds=12.0)
    wire.takes_commands = False
    let_end(step)
    time.sleep(13)
    assert running.error is None
    wire.takes_commands = True
    running.wait()
    assert (step.root / "outputs" / "model").read_text() == "made"


def test_outputs_that_can_not_be_had_now_are_fetched_by_the_next_try(
    step: PodStep, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnecting, "PATIENCE_SECONDS", 2.0)
    running = step.start(ON_DEMAND)
    wire.takes_commands = False
    let_end(step)
    with pytest.raises(ComputeUnavailableError, match=r"nothing got through .*next try fetches it"):
        running.wait()
    first, pod = step.lines, step.look.pod().metadata.uid
    wire.takes_commands = True
    retry = step.launcher()
    assert retry.recover(step.name, step.handle)
    assert step.python("", launcher=retry) == first
    assert (step.root / "outputs" / "model").read_text() == "made"
    assert pod
