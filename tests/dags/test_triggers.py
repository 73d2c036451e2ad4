"""What a trigger does besides waiting."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from airflow_mlpipelines.compute.kubernetes import awaiting
from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
from airflow_mlpipelines.triggers import pod
from airflow_mlpipelines.triggers.pod import PodTrigger


def test_what_an_earlier_trigger_of_the_try_has_logged_is_put_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__LOGGING__BASE_LOG_FOLDER", str(tmp_path))
    folder = tmp_path / "dag_id=d" / "run_id=r" / "task_id=t"
    folder.mkdir(parents=True)
    (folder / "attempt=1.log").write_text("the worker's")
    (folder / "attempt=1.log.trigger.7.log").write_text("the first trigger's")
    (folder / "attempt=11.log.trigger.7.log").write_text("another try's")

    trigger = PodTrigger(watch={})
    trigger.task_instance = SimpleNamespace(
        dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1
    )

    assert trigger.task_id == "t"
    names = {file.name: file.read_text() for file in folder.iterdir()}
    assert names.pop("attempt=1.log") == "the worker's"
    assert names.pop("attempt=11.log.trigger.7.log") == "another try's"
    [(name, text)] = names.items()
    assert name.startswith("attempt=1.log.trigger.7.log.")
    assert text == "the first trigger's"


def test_a_trigger_comes_back_from_its_arguments_with_nothing_secret_in_them():
    lease = {"fingerprint": "f" * 64, "holder": "d/r/t", "token": "1234"}
    made = PodTrigger(watch={"awaits": "end"}, lease=lease)
    path, arguments = made.serialize()
    assert path == "airflow_mlpipelines.triggers.pod.PodTrigger"
    assert PodTrigger(**arguments).serialize() == (path, arguments)
    assert arguments == {"watch": {"awaits": "end"}, "lease": lease}


LEASE = {"fingerprint": "f" * 64, "holder": "d/r/t", "token": "1234"}
WATCH = {
    "compute": "cluster",
    "namespace": "ml",
    "conn_id": None,
    "in_cluster": False,
    "selector": "step_run=mlp-1",
    "pods": {"mlp-1": "uid-1"},
    "secret": None,
    "awaits": "end",
    "schedule_seconds": 600,
    "startup_seconds": 300,
    "timeout_seconds": None,
}


class KilledTrigger(PodTrigger):
    """A trigger whose task was stopped, with what it did, one after the other."""

    def __init__(self, monkeypatch, answer, removals):
        super().__init__(watch=WATCH, lease=LEASE)
        self._answer = answer
        self.did = []

        async def remove(watch, *, token):
            self.did.append("remove")
            found = removals.pop(0) if len(removals) > 1 else removals[0]
            if isinstance(found, Exception):
                raise found
            return found

        sleep = asyncio.sleep

        async def pause(seconds):
            if seconds == 30.0:
                self.did.append("wait for a takeover")
            await sleep(0 if seconds < 100 else seconds)

        monkeypatch.setattr(awaiting, "remove_pods", remove)
        monkeypatch.setattr(pod, "release_left", lambda lease: self.did.append("release"))
        monkeypatch.setattr(pod, "_ANSWER_SECONDS", 0.2)
        monkeypatch.setattr(asyncio, "sleep", pause)

    async def _is_still_deferred(self):
        if self._answer == "never":
            await asyncio.sleep(1000)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def kill(self):
        asyncio.run(self.on_kill())
        return self.did


@pytest.mark.parametrize("answer", [True, RuntimeError("502: Bad Gateway"), "never"])
def test_a_task_that_may_be_deferred_is_left_time_for_a_takeover(monkeypatch, answer):
    assert KilledTrigger(monkeypatch, answer, [False]).kill() == ["wait for a takeover", "remove"]


def test_a_task_that_was_stopped_loses_its_pod_at_once_and_gives_its_lease_back(monkeypatch):
    away = ClusterError(503, "away")
    removals = [away, True]
    assert KilledTrigger(monkeypatch, False, removals).kill() == ["remove", "remove", "release"]


def test_a_pod_that_can_t_be_removed_keeps_its_lease(monkeypatch):
    did = KilledTrigger(monkeypatch, False, [ClusterError(503, "away")]).kill()
    assert did == ["remove"] * 5


@pytest.mark.parametrize(("answer", "did"), [(False, ["release"]), (True, [])])
def test_a_step_that_waits_for_room_has_only_a_lease_to_give_back(monkeypatch, answer, did):
    trigger = KilledTrigger(monkeypatch, answer, [False])
    trigger.watch = {**WATCH, "pods": {}, "awaits": "room", "pause_seconds": 30.0}
    assert trigger.kill() == did  # one that may go on elsewhere keeps it
