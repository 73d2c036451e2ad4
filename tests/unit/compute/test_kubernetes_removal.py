"""Deleting what is left of a step while the API server is busy: a real one can't be told when to be."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.compute.kubernetes import removal
from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
from airflow_mlpipelines.compute.kubernetes.lifetime import has_secret
from airflow_mlpipelines.compute.kubernetes.removal import Thing, delete_all

POD, SECRET = Thing("pods", "a", uid="1", seconds=2), Thing("secrets", "a")


class _Busy:
    """An API server that answers each deletion with the next of its statuses; 200 deletes."""

    def __init__(self, **statuses: list[int]) -> None:
        self._statuses = statuses
        self.deleted: list[str] = []

    def delete(self, kind: str, name: str, *, seconds: int, uid: str | None = None) -> None:
        status = self._statuses[kind].pop(0)
        if status != 200:
            raise ClusterError(status, f"{kind}: {status}")
        self.deleted.append(kind)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(removal, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(removal, "_LONGEST_PAUSE", 0.02)


def test_a_server_that_is_busy_for_a_moment_keeps_nothing():
    server = _Busy(pods=[429, 503, 200], secrets=[0, 200])
    delete_all(server, [POD, SECRET])
    assert server.deleted == ["secrets", "pods"]


def test_what_is_refused_keeps_nothing_else_from_going():
    server = _Busy(pods=[403], secrets=[503, 200])
    with pytest.raises(ClusterError, match="pods: 403"):
        delete_all(server, [POD, SECRET])
    assert server.deleted == ["secrets"]


def test_patience_ends():
    server = _Busy(pods=[503] * 1000, secrets=[200])
    with pytest.raises(ClusterError, match="pods: 503"):
        delete_all(server, [POD, SECRET], patience=0.2)
    assert server.deleted == ["secrets"]


def test_without_patience_each_is_tried_once():
    server = _Busy(pods=[503, 200], secrets=[200])
    with pytest.raises(ClusterError):
        delete_all(server, [POD, SECRET], patience=0)
    assert server.deleted == ["secrets"]


@pytest.mark.parametrize(
    ("name", "expected"), [("mlp-1", True), ("of-somebody-else", False)], ids=["own", "another"]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda name: {"imagePullSecrets": [{"name": name}]},
        lambda name: {"volumes": [{"name": "job", "secret": {"secretName": name}}]},
        lambda name: {
            "containers": [
                {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": name, "key": "0"}}}]}
            ]
        },
    ],
    ids=["to pull with", "mounted", "as a variable"],
)
def test_a_pods_own_secret_is_known_by_whatever_refers_to_it(make, name, expected):
    spec = {"containers": [{"env": [{"name": "B", "value": "x"}]}], "volumes": None, **make(name)}
    assert has_secret({"metadata": {"name": "mlp-1"}, "spec": spec}) is expected
