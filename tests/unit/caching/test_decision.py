"""Decisions and plans as JSON."""

from __future__ import annotations

import json

import pytest

from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.exceptions import CacheError
from airflow_mlpipelines.storage.artifact import Artifact

OUTPUT = Artifact("memory://a", f"blake3:{'1' * 64}", 1, 1, "file", step_run="mlp-1")

PLAN = RunPlan(
    steps={
        "reused": StepDecision(
            Decision.REUSE,
            "nothing changed",
            fingerprint="f" * 64,
            outputs={"out": OUTPUT, "other": Artifact("memory://b", OUTPUT.digest, 1, 1, "dir")},
            step_run="mlp-1",
            seconds_saved=1.5,
        ),
        "adopted": StepDecision(
            Decision.REUSE, "nothing changed", outputs={"out": OUTPUT}, step_run="mlp-2"
        ),
        "ran": StepDecision(Decision.RUN, "a.py changed", MissReason.CHANGED, "e" * 64),
        "later": StepDecision(Decision.LATER, "decided later", MissReason.UPSTREAM_RUNS),
    },
    code={"reused": "c" * 64, "ran": None},
    environments={"reused": "d" * 64, "ran": "d" * 64},
    snapshots={"reused": "s" * 64},
    external={"store/raw": OUTPUT, "store/absent": None},
    parameters={"rate": 0.1, "name": "x", "on": True},
)


def test_a_plan_survives_json():
    assert RunPlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


def test_texts_that_steps_share_stand_there_once():
    text = json.dumps(PLAN.to_dict())

    assert text.count("nothing changed") == 1
    assert text.count("d" * 64) == 1


def test_a_plan_of_a_thousand_steps_is_small():
    steps = {}
    for number in range(1000):
        run = f"mlp-{number:020x}"
        uri = f"s3://bucket/team/workspace/pipeline/step_{number}/{run}/out"
        output = Artifact(uri, f"blake3:{number:064x}", 10**9, 100, "dir", step_run=run)
        steps[f"step_{number}"] = StepDecision(
            Decision.REUSE,
            "nothing changed since 2026-11-21 05:00",
            fingerprint=f"{number:064x}",
            outputs={"out": output},
            step_run=run,
            seconds_saved=1.5,
        )
    shared = dict.fromkeys(steps, "a" * 64)
    plan = RunPlan(steps=steps, code=shared, environments=shared, snapshots=shared)

    assert len(json.dumps(plan.to_dict(), separators=(",", ":"))) < 500_000


def test_a_plan_of_another_release_is_refused_with_the_remedy():
    with pytest.raises(CacheError, match=r"version 99.* Clear the run's first task"):
        RunPlan.from_dict({**PLAN.to_dict(), "version": 99})


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": None},
        {"steps": {"a": {}}},
        {"steps": {"a": {"decision": "perhaps", "reason": 0}}},
        {"steps": {"a": {"decision": "run", "reason": 99}}},
        {"steps": {"a": {"decision": "run", "reason": 0, "miss": "moon"}}},
        {"steps": {"a": {"decision": "reuse", "reason": 0, "outputs": {"out": "file:///x"}}}},
        {"steps": {"a": {"decision": "reuse", "reason": 0, "outputs": {"out": {"uri": "x"}}}}},
        {"code": {"a": 10**6}},
        {"texts": None},
        {"external": {"a": {"uri": "file:///etc/passwd"}}},
    ],
)
def test_a_plan_that_somebody_edited_is_refused(damage):
    with pytest.raises(CacheError, match="damaged"):
        RunPlan.from_dict({**PLAN.to_dict(), **damage})


@pytest.mark.parametrize("data", [{}, {"version": 1}])
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(CacheError, match="damaged"):
        RunPlan.from_dict(data)


def test_only_what_the_user_asked_for_runs_whatever_is_remembered():
    assert {reason for reason in MissReason if reason.is_forced} == {
        MissReason.REUSE_OFF,
        MissReason.REGENERATE,
    }
