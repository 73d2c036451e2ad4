"""The summary of a run."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.caching.index import MetadataIndex, StepRunRecord
from airflow_mlpipelines.execution.summary import summarize_run
from airflow_mlpipelines.storage.artifact import Artifact

RUN = StepDecision(Decision.RUN, "never ran before", MissReason.NEVER_RUN)


def artifact(name: str) -> Artifact:
    return Artifact(f"memory://store/{name}", f"blake3:{0:064x}", 1, 1, "file")


def record(task_id: str, state: str, **fields) -> StepRunRecord:
    step = task_id.rpartition(".")[2]
    return StepRunRecord("dag", "run", task_id, "pipeline", step, "mlp-1", state, "why", **fields)


@pytest.fixture
def index(tmp_path):
    return MetadataIndex(f"sqlite:///{tmp_path / 'metadata.db'}")


def test_it_counts_each_step_by_its_newest_try_and_adds_up_the_time_saved(index):
    reused = StepDecision(Decision.REUSE, "unchanged", seconds_saved=2.5)
    plan = RunPlan({"a": reused, "b": RUN, "c": RUN, "branch": RUN, "d": RUN})
    index.record_step_runs([record("b", "failed"), record("c", "reused", seconds_saved=1.0)])
    index.record_step_runs([record("b", "ran"), record("d", "failed")])

    summary = summarize_run(plan, index, dag_id="dag", run_id="run")

    assert summary == {
        "ran": 1,
        "reused": 2,
        "failed": 1,
        "skipped": 1,
        "seconds_saved": 3.5,
        "outputs": {},
    }


def test_what_the_pipeline_offers_comes_from_the_run_or_from_the_plan(index):
    kept = StepDecision(Decision.REUSE, "unchanged", outputs={"out": artifact("kept")})
    plan = RunPlan(
        {"a": kept, "b": RUN, "c": RUN},
        offers={"first": ("a", "out"), "second": ("b", "out"), "third": ("c", "out")},
    )
    index.record_step_runs([record("group.b", "ran", outputs={"out": artifact("made")})])

    summary = summarize_run(plan, index, dag_id="dag", run_id="run", prefix="group.")

    assert summary["outputs"] == {
        "first": artifact("kept").to_dict(),
        "second": artifact("made").to_dict(),
    }
