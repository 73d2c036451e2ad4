"""The rights of deploy/helm/rbac.yaml, granted on a real cluster: a step runs with them, and nothing more goes.

That they are enough for a step that is deferred, ``test_deferral.py`` shows: it runs with them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.kubernetes.rights import Account, grant_rights
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep

if TYPE_CHECKING:
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
]
REFUSED = [
    ("secrets", "", "get"),
    ("secrets", "", "list"),
    ("pods", "", "deletecollection"),
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
