"""The rights of deploy/helm/rbac.yaml, granted on a real cluster: steps run with them, and nothing more goes.

That they are enough for a step that is deferred, ``test_deferral.py`` shows: it runs with them too.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter, remove_pods
from airflow_mlpipelines.compute.kubernetes.detaching import PodWatch
from tests.gangs import COUNT, WAIT
from tests.integration.kubernetes.rights import Account, grant_rights
from tests.integration.kubernetes.test_kubernetes_gang import (
    Gang,
    leave_running,
    wait_without_worker,
)
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.kubernetes.conftest import Cluster

pytestmark = pytest.mark.kubernetes

USED = [
    ("pods", "", "create"),
    ("pods", "", "get"),
    ("pods", "", "list"),
    ("pods", "", "watch"),
    ("pods", "", "patch"),
    ("pods", "", "delete"),
    ("pods", "log", "get"),
    ("pods", "exec", "create"),
    ("pods", "exec", "get"),
    ("secrets", "", "create"),
    ("secrets", "", "delete"),
    ("jobs.batch", "", "create"),
    ("jobs.batch", "", "get"),
    ("jobs.batch", "", "patch"),
    ("jobs.batch", "", "delete"),
    ("services", "", "create"),
    ("services", "", "delete"),
    ("events", "", "list"),
]
REFUSED = [
    ("secrets", "", "get"),
    ("secrets", "", "list"),
    ("pods", "", "deletecollection"),
    ("pods", "", "update"),
    ("jobs.batch", "", "list"),
    ("jobs.batch", "", "update"),
    ("jobs.batch", "", "deletecollection"),
    ("cronjobs.batch", "", "create"),
    ("services", "", "get"),
    ("services", "", "patch"),
    ("events", "", "create"),
    ("configmaps", "", "create"),
    ("serviceaccounts", "token", "create"),
]


@pytest.fixture(scope="module")
def accounts(cluster: Cluster) -> list[Account]:
    return grant_rights(cluster)


def test_workers_and_triggerer_may_do_what_steps_take_and_no_more(
    accounts: list[Account],
) -> None:
    assert [account.name for account in accounts] == ["airflow-worker", "airflow-triggerer"]
    for account in accounts:
        assert [right for right in USED if not account.may(*right)] == []
        assert [right for right in REFUSED if account.may(*right)] == []


def test_a_step_runs_with_these_rights(
    accounts: list[Account], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = accounts[0]
    worker.write_kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    step = PodStep(tmp_path / "step", worker.cluster.kubeconfig, worker.cluster.namespace)
    try:
        program = "import os; print('the word is', os.environ['WORD'])"
        assert "the word is open" in step.python(program, secrets={"WORD": "open"})
    finally:
        left = step.look.remove()
    assert left == []


@pytest.fixture
def become(
    accounts: list[Account], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Return what makes the test go on with an account's rights and no others."""
    for account in accounts:
        account.write_kubeconfig(tmp_path / account.name)
    return lambda name: monkeypatch.setenv("KUBECONFIG", str(tmp_path / name))


@pytest.fixture
def gang(cluster: Cluster, tmp_path: Path) -> Iterator[Gang]:
    made = Gang(tmp_path / "step", cluster.kubeconfig, cluster.namespace)
    try:
        yield made
    finally:
        made.remove_others()
        made.look.remove()


def test_a_step_on_several_nodes_goes_from_worker_to_triggerer_and_back_with_these_rights(
    gang: Gang, become: Callable[[str], None]
) -> None:
    become("airflow-worker")
    watch = leave_running(gang, COUNT)
    become("airflow-triggerer")
    news, _ = wait_without_worker(watch)
    assert news["reason"] == "its step has ended"
    become("airflow-worker")
    gang.run_gang(COUNT, gang.launcher(), detach=True, news=news)
    gang.assert_nothing_left()


def test_the_triggerer_may_remove_a_stopped_step_of_several_nodes(
    gang: Gang, become: Callable[[str], None]
) -> None:
    become("airflow-worker")
    watch = PodWatch.from_dict(leave_running(gang, WAIT))
    become("airflow-triggerer")
    awaiter = PodAwaiter(watch, lambda *_: None, token="a trigger")
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(awaiter.wait(), 2))
    assert asyncio.run(remove_pods(watch, token="a trigger"))
    gang.handle.set(None)
    gang.assert_nothing_left()
