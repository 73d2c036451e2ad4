"""What a trigger finds out about pods that were left to themselves, and what is handed on to the next worker."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines.compute.kubernetes.detaching import (
    Awaited,
    PodNews,
    PodWatch,
    Reason,
    judge,
    remember,
)
from airflow_mlpipelines.compute.kubernetes.failures import PodLostError
from airflow_mlpipelines.compute.kubernetes.logs import StepLog
from airflow_mlpipelines.compute.kubernetes.relaunch import BUDGET, PodNote
from airflow_mlpipelines.compute.kubernetes.starting import StartErrors
from airflow_mlpipelines.compute.log_position import LogEntry, LogPosition
from airflow_mlpipelines.execution.handles import FileHandle

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
WATCH = PodWatch(
    compute="cluster",
    namespace="ml",
    conn_id="my_cluster",
    in_cluster=None,
    selector="step_run=mlp-1",
    pods={"mlp-1": "uid-1"},
    secret="mlp-1",
    awaits=Awaited.END,
    schedule_seconds=600,
    startup_seconds=300,
    timeout_seconds=100,
    logs={"mlp-1": None},
)


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_pod(
    *,
    stage: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    scheduled: float | None = 100,
    created: float = 200,
    uid: str = "uid-1",
    told_to_go: float | None = None,
    **status: Any,
) -> dict[str, Any]:
    """Return a pod; times are how many seconds ago."""
    meta: dict[str, Any] = {"name": "mlp-1", "uid": uid, "creationTimestamp": ago(created)}
    if told_to_go is not None:
        meta["deletionTimestamp"] = ago(told_to_go)
    conditions = list(status.pop("conditions", []))
    if scheduled is not None:
        conditions.append(
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": ago(scheduled)}
        )
    return {
        "metadata": meta,
        "spec": {},
        "status": {
            "initContainerStatuses": [{"name": "stage", "state": stage or {"waiting": {}}}],
            "containerStatuses": [{"name": "step", "state": step or {"waiting": {}}}],
            "conditions": conditions,
            **status,
        },
    }


DONE = {"terminated": {"exitCode": 0, "finishedAt": ago(50)}}
RUNNING = {"running": {"startedAt": ago(50)}}


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (make_pod(scheduled=None), None),
        (make_pod(scheduled=None, created=601), Reason.UNSCHEDULED),
        (make_pod(scheduled=299), None),
        (make_pod(scheduled=301, created=301), Reason.UNSTARTED),
        (make_pod(stage=RUNNING), Reason.READY),
        (make_pod(stage=RUNNING, told_to_go=-20), Reason.READY),
        (make_pod(told_to_go=-20), Reason.OVER),
        (make_pod(phase="Failed"), Reason.OVER),
        (make_pod(uid="uid-2"), Reason.GONE),
        (None, Reason.GONE),
        (make_pod(stage={"terminated": {"exitCode": 1}}), Reason.HOPELESS),
        (make_pod(stage={"waiting": {"reason": "InvalidImageName"}}), Reason.HOPELESS),
        (make_pod(stage={"waiting": {"reason": "ImagePullBackOff"}}, scheduled=200), None),
    ],
)  # fmt: skip
def test_a_pod_without_files_calls_for_a_worker_once_it_is_ready_or_never_will_be(
    pod: Any, reason: Reason | None
) -> None:
    assert judge(replace(WATCH, awaits=Awaited.FILES), {"mlp-1": pod}, NOW, StartErrors()) is reason


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (make_pod(stage=DONE), None),
        (make_pod(stage={"terminated": {"exitCode": 0, "finishedAt": ago(301)}}), Reason.UNSTARTED),
        (make_pod(stage=DONE, step=RUNNING), None),
        (make_pod(stage=DONE, step={"running": {"startedAt": ago(101)}}), Reason.EXPIRED),
        (make_pod(stage=DONE, step={"terminated": {"exitCode": 3}}), Reason.ENDED),
        (make_pod(stage=DONE, step={"waiting": {"reason": "ErrImageNeverPull"}}), Reason.HOPELESS),
        (make_pod(stage=DONE, step=RUNNING, told_to_go=-25), None),  # it has its grace to end in
        (make_pod(stage=DONE, step=RUNNING, told_to_go=20), None),
        (make_pod(stage=DONE, step=RUNNING, told_to_go=40), Reason.OVER),  # its node does not answer
        (make_pod(stage=DONE, step=RUNNING, phase="Failed", reason="Evicted"), Reason.OVER),
        (None, Reason.GONE),
    ],
)  # fmt: skip
def test_a_pod_with_its_files_calls_for_a_worker_at_the_end(
    pod: Any, reason: Reason | None
) -> None:
    assert judge(WATCH, {"mlp-1": pod}, NOW, StartErrors()) is reason


def test_a_registry_that_is_away_gets_its_time_from_the_first_error_that_a_trigger_sees() -> None:
    times = iter([0.0, 100.0, 121.0])
    errors = StartErrors(lambda: next(times))
    watch = replace(WATCH, awaits=Awaited.FILES, startup_seconds=1e9)
    pod = make_pod(stage={"waiting": {"reason": "ErrImagePull", "message": "connection reset"}})
    found = [judge(watch, {"mlp-1": pod}, NOW, errors) for _ in range(3)]
    assert found == [None, None, Reason.HOPELESS]


def test_pods_of_several_call_together_or_at_the_first_that_fails() -> None:
    watch = replace(WATCH, pods={"one": "uid-1", "two": "uid-1"}, logs={})
    ended = make_pod(stage=DONE, step={"terminated": {"exitCode": 0}})
    running = make_pod(stage=DONE, step=RUNNING)
    assert judge(watch, {"one": ended, "two": running}, NOW, StartErrors()) is None
    assert judge(watch, {"one": ended, "two": ended}, NOW, StartErrors()) is Reason.ENDED
    assert (
        judge(watch, {"one": running, "two": make_pod(phase="Failed")}, NOW, StartErrors())
        is Reason.OVER
    )
    assert judge(watch, {"one": running}, NOW, StartErrors()) is Reason.GONE


def test_watch_and_news_are_json_and_come_back_as_they_were() -> None:
    assert PodWatch.from_dict(json.loads(json.dumps(WATCH.to_dict()))) == WATCH
    pod = make_pod(stage=DONE, step={"terminated": {"exitCode": 137, "reason": "Error"}})
    news = PodNews(Reason.GONE, "", {"mlp-1": remember(pod)}, {"mlp-1": None})
    assert PodNews.from_dict(json.loads(json.dumps(news.to_dict()))) == news


def test_what_is_remembered_of_a_pod_is_bounded_and_says_why_it_went() -> None:
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "m" * 10_000,
    }
    pod = make_pod(conditions=[condition], message="x" * 10_000, told_to_go=1)
    pod["metadata"]["managedFields"] = ["y" * 10_000]
    kept = json.dumps(remember(pod))
    assert "PreemptionByScheduler" in kept
    assert len(kept) < 2500


def test_a_try_launches_again_five_times_with_growing_pauses(tmp_path: Any) -> None:
    handle = FileHandle(tmp_path / "handle.json")
    lost = PodLostError("train", "it is gone", why="Preempted")
    pauses = []
    for number in range(1, BUDGET + 1):
        note = PodNote(handle)  # whoever goes on, perhaps another worker
        note.set(f"uid-{number}", awaits="end")
        assert (handle.get() or {})["pod"] == f"uid-{number}"
        again = PodNote(handle).charge(lost)
        assert again is not None
        assert f"(Preempted); launched again ({number} of 5)" in str(again)
        assert PodNote(handle).pod is None
        pauses.append(again.pause)
    assert pauses == sorted(pauses)
    assert pauses[-1] <= 60
    assert PodNote(handle).charge(lost) is None
    assert handle.get() is None


# ---- the log, from one reader to the next --------------------------------------------------------


def serve(lines: list[tuple[int, bytes]], query: dict[str, str]) -> bytes:
    """Return what a kubelet answers: a time before every line, from a whole second on."""
    since = query.get("sinceTime", "").rstrip("Z")
    stamped = [
        ((NOW + timedelta(milliseconds=at)).strftime("%Y-%m-%dT%H:%M:%S.%f000Z"), text)
        for at, text in lines
    ]
    return b"".join(time.encode() + b" " + text + b"\n" for time, text in stamped if time >= since)


@given(
    pauses=st.lists(st.sampled_from([0, 1, 1, 30, 999, 4000]), max_size=60),
    texts=st.sampled_from(["plain", "ü" * 30, "10%\r20%\r30%", "x" * 200]),
    cuts=st.lists(st.integers(0, 6000), max_size=4),
)
def test_readers_that_follow_each_other_hand_on_every_line_once(
    pauses: list[int], texts: str, cuts: list[int]
) -> None:
    at, lines = 0, []
    for number, pause in enumerate(pauses):
        at += pause
        lines.append((at, f"{number} {texts}".encode()))
    seen: list[str] = []
    position = None
    for cut in [*cuts, None]:
        reader = StepLog(lambda _time, line: seen.append(line), position)
        reader.feed(serve(lines, reader.open(follow=True))[:cut])
        reader.close()
        if cut is None:
            reader.finish()
        position = json.loads(json.dumps(reader.to_dict()))
    assert seen == [text.decode().rpartition("\r")[2] if "\r" in text.decode() else text.decode() for _, text in lines]  # fmt: skip


def test_a_position_stays_small_however_fast_a_log_comes() -> None:
    position = LogPosition()
    times = [f"2026-01-31T12:00:00.{number:09d}Z" for number in range(100_000)]
    for time in times[:-10]:
        assert position.is_new(LogEntry(time, 0, b""))
    assert sum(len(counts) for counts in position._seen.values()) <= 20_000
    handed_on = position.to_dict()
    assert len(json.dumps(handed_on)) < 2000
    again = LogPosition.from_dict(handed_on)
    assert again.reopen() == int(datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp())
    assert [time for time in times if again.is_new(LogEntry(time, 0, b""))] == times[-10:]
