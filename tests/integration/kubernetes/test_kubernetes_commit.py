"""What a pod has made stays within reach until it is committed, and nothing stays after that. On a real cluster."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter
from airflow_mlpipelines.compute.kubernetes.detaching import PodNews, PodWatch
from airflow_mlpipelines.exceptions import ComputeUnavailableError, DataError, StoreError
from airflow_mlpipelines.execution import program
from airflow_mlpipelines.execution.step import Resumption
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_gang import Gang
from tests.integration.kubernetes.tries import MAKE, TriedStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kubernetes


@pytest.fixture
def tried(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., TriedStep]]:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    made: list[TriedStep] = []

    def make(**fields: Any) -> TriedStep:
        made.append(TriedStep(tmp_path, cluster.kubeconfig, cluster.namespace, **fields))
        return made[-1]

    yield make
    for step in made:
        others(step).remove_others()
        step.look.remove()


def others(step: TriedStep) -> Gang:
    """Return what looks for Jobs and Services of the step."""
    folder = step.folder / f"look-{uuid.uuid4().hex}"
    return Gang(folder, step.kubeconfig, step.namespace, step.look.name)


def assert_nothing_left(step: TriedStep) -> None:
    wait_until(lambda: not step.look.pods(), "the pods are gone")
    wait_until(lambda: not step.look.secrets(), "the Secrets are gone")
    assert others(step).others() == []
    assert step.handle.get() is None


def wait_for(watch: dict[str, Any]) -> Resumption:
    """Do what a trigger does."""
    awaiter = PodAwaiter(PodWatch.from_dict(watch), lambda *_: None, token="trigger")
    news: PodNews = asyncio.run(asyncio.wait_for(awaiter.wait(), 120))
    return Resumption(news.to_dict(), time.time())


@pytest.mark.parametrize("nodes", [1, 2], ids=["pod", "gang"])
def test_a_worker_that_dies_while_it_commits_costs_no_second_run(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    step = tried(nodes=nodes)
    step.lose_worker(1, monkeypatch)
    before = step.logged_words()
    assert len(before) == nodes  # each rank has made up one
    result = step.carry_out(2)
    assert step.made(result) in before
    assert step.words() == before
    assert_nothing_left(step)


def test_so_it_is_for_a_step_that_was_left_to_itself(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried(script="import time; time.sleep(4)\n" + MAKE)
    resumption = wait_for(step.detach(1))
    step.lose_worker(1, monkeypatch, resumption=resumption)
    before = step.logged_words()
    result = step.carry_out(2)
    assert {step.made(result)} == before
    assert_nothing_left(step)


def test_a_store_that_is_away_leaves_the_pod_for_the_next_worker(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried()

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(program, "commit_outputs", refuse)
        with pytest.raises(StoreError):
            step.carry_out(1)
        uid = step.look.pod().metadata.uid
        assert step.handle.get() == {"launcher": "kubernetes", "pod": uid}
        with pytest.raises(StoreError):
            step.carry_out(2)  # the last one
    assert len(step.words()) == 1
    assert_nothing_left(step)


def test_an_output_that_was_not_made_leaves_no_pod_to_adopt(
    tried: Callable[..., TriedStep],
) -> None:
    step = tried(script="print('nothing')")
    with pytest.raises(DataError, match="was not made"):
        step.carry_out(1)
    assert_nothing_left(step)


def test_a_step_that_is_killed_while_it_commits_leaves_no_pod(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried()
    commit_outputs = program.commit_outputs

    def kill_and_commit(*arguments: Any, **options: Any) -> Any:
        runner.kill()
        wait_until(lambda: all(map(_is_leaving, step.look.pods())), "the pod was told to go")
        return commit_outputs(*arguments, **options)

    monkeypatch.setattr(program, "commit_outputs", kill_and_commit)
    with step.on_worker(1):
        runner = step.runner(1)
        runner.run()
    assert_nothing_left(step)


def test_a_step_that_finds_no_place_says_so_in_the_index_and_leaves_nothing(
    tried: Callable[..., TriedStep],
) -> None:
    step = tried(compute={"schedule_timeout_seconds": 3, "node_selector": {"no": "such-node"}})
    with pytest.raises(ComputeUnavailableError):
        step.carry_out(1)
    [record] = step.index.find_step_runs(dag_id="dag", run_id=step.run_id)
    assert record.state == "failed"
    assert "no node of compute 'cluster' took its pod within" in record.reason
    assert list(step.folder.glob("worker-1/mlpipelines/work/*")) == []
    assert_nothing_left(step)


def _is_leaving(pod: Any) -> bool:
    return pod.metadata.deletion_timestamp is not None
