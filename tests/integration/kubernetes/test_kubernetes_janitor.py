"""What step runs have left on a real cluster is removed by the next run, and nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import yaml

from airflow_mlpipelines.caching.launches import Launches
from airflow_mlpipelines.execution import janitor, program
from airflow_mlpipelines.execution.janitor import clear_up
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_commit import assert_nothing_left, tried

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.kubernetes.tries import TriedStep

__all__ = ["tried"]
pytestmark = pytest.mark.kubernetes
HOUR, MONTH = 3600, 30 * 24 * 3600


def clear_up_after(step: TriedStep, state: str | None, *, age: float = HOUR) -> int:
    """Do what the first task of a run does, ``age`` seconds later, with Airflow's ``state`` of the step."""
    with step.index.writing() as connection:
        connection.execute(sa.text(f"UPDATE mlp_launches SET noted_at = noted_at - {age}"))

    def find_states(dag_id: str, run_ids: list[str], task_ids: list[str]) -> dict[str, Any]:
        assert dag_id == "dag"
        assert task_ids == ["train"]
        return {} if state is None else {run_id: {"train": state} for run_id in run_ids}

    try:
        return clear_up(step.graph(), step.index, find_states)
    finally:
        with step.index.writing() as connection:
            connection.execute(sa.text(f"UPDATE mlp_launches SET noted_at = noted_at + {age}"))


def is_there(step: TriedStep) -> bool:
    return any(pod.metadata.deletion_timestamp is None for pod in step.look.pods())


@pytest.mark.parametrize("nodes", [1, 2], ids=["pod", "gang"])
def test_what_a_lost_worker_without_retries_has_left_is_removed(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    step = tried(retries=0, nodes=nodes)
    step.lose_worker(1, monkeypatch)
    assert clear_up_after(step, "running") == 0
    assert clear_up_after(step, "failed", age=60) == 0
    assert is_there(step)
    assert step.look.secrets()
    assert clear_up_after(step, "failed") == 1
    assert Launches(step.index).list_all() == []
    step.handle.set(None)
    assert_nothing_left(step)


def test_nothing_that_others_have_launched_is_touched(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried(retries=0)
    step.lose_worker(1, monkeypatch)
    with step.index.writing() as connection:
        connection.execute(sa.text("UPDATE mlp_launches SET word = 'of another deployment'"))
    assert clear_up_after(step, "failed") == 1  # there is nothing of ours
    assert is_there(step)


def test_a_run_that_airflow_does_not_know_keeps_what_runs_and_loses_what_has_ended(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried(retries=0)
    step.lose_worker(1, monkeypatch)
    assert clear_up_after(step, None, age=HOUR) == 0
    assert clear_up_after(step, None, age=MONTH) == 0  # a helper is still there
    step.look.execute("sh", "-c", "touch control/done; kill 1")
    wait_until(lambda: step.look.pod().status.phase == "Succeeded", "the pod has ended")
    assert clear_up_after(step, "running", age=MONTH) == 0  # its worker is committing
    assert clear_up_after(step, None, age=MONTH) == 1
    wait_until(lambda: not step.look.pods(), "the pod is gone")


def test_an_attempt_that_was_cleared_is_over(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried(retries=0)
    step.lose_worker(1, monkeypatch)
    Launches(step.index).note(
        "another", task=step.identity(1).task, attempt=1, nodes=1, site={"of": "the new attempt"}
    )
    assert clear_up_after(step, "running") == 1
    wait_until(lambda: not step.look.pods(), "the pod is gone")


def test_a_cluster_that_does_not_answer_is_not_waited_for(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tried(retries=0)
    step.lose_worker(1, monkeypatch)
    kubeconfig = step.folder / "kubeconfig"
    config = yaml.safe_load(step.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    kubeconfig.write_text(yaml.safe_dump(config))
    with monkeypatch.context() as patch:
        patch.setenv("KUBECONFIG", str(kubeconfig))
        assert clear_up_after(step, "failed") == 0
    assert clear_up_after(step, "failed") == 1


def test_a_step_that_ends_well_leaves_no_record(
    tried: Callable[..., TriedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    commit_outputs = program.commit_outputs

    def commit(*arguments: Any, **options: Any) -> Any:
        seen.extend(Launches(step.index).list_all())
        return commit_outputs(*arguments, **options)

    monkeypatch.setattr(program, "commit_outputs", commit)
    step = tried()
    step.carry_out(1)
    assert [record.step_run for record in seen] == [step.look.name]
    assert Launches(step.index).list_all() == []
    monkeypatch.setattr(janitor, "remove_left", None)  # so there is nobody to ask
    assert clear_up_after(step, "success") == 0
