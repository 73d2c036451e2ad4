"""What is remembered and what happened, asked of a metadata index on SQLite."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from airflow_mlpipelines.caching.index import CacheEntry, StepRunRecord
from airflow_mlpipelines.storage.artifact import Artifact

MADE_AT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
TABLE = Artifact("file:///data/train/1", f"blake3:{'a' * 64}", 2048, 1, "file")


def ingredients(rate):
    return {"step": {"type": "CommandStep"}, "parameters": {"rate": rate}, "inputs": {}}


def make_entry(key, step="train", pipeline="churn", *, hours=0, rate=0.1):
    return CacheEntry(
        fingerprint=f"{key:0<64}",
        pipeline=pipeline,
        step=step,
        step_type="CommandStep",
        outputs={"table": TABLE},
        ingredients=ingredients(rate),
        seconds=90.0,
        writer="ann",
        step_run=f"mlp-{key}",
        created_at=MADE_AT + timedelta(hours=hours),
    )


def make_record(run, rate, *, state="ran", reason="never ran before in this pipeline"):
    return StepRunRecord(
        dag_id="churn_dag",
        run_id=run,
        task_id="train",
        pipeline="churn",
        step="train",
        step_run=f"mlp-{run}",
        state=state,
        reason=reason,
        fingerprint=f"{run:0<64}",
        ingredients=ingredients(rate),
        seconds=2.5,
    )


@pytest.fixture
def entries(index):
    """Three entries; the newest is of another pipeline."""
    index.put_entries(
        [
            make_entry("ab1"),
            make_entry("ab2", "report", hours=1),
            make_entry("cd3", pipeline="sales", hours=2),
        ]
    )
    return index


@pytest.fixture
def history(index):
    """Four runs of one step: one, one with another rate, a failed one, and a reused one."""
    index.record_step_runs(
        [
            make_record("run1", 0.1),
            make_record("run2", 0.2, reason="rate 0.1 -> 0.2"),
            make_record("run3", 0.3, state="failed", reason="exit code 3"),
            make_record("run4", 0.1, state="reused", reason="nothing changed since run1"),
        ]
    )
    return index


def keys(answer):
    assert answer.code == 0, answer.err
    return [entry["fingerprint"][:3] for entry in answer.json]


@pytest.mark.usefixtures("entries")
def test_what_is_remembered_is_listed_newest_first(mlpipelines):
    assert keys(mlpipelines("cache", "ls", "--json")) == ["cd3", "ab2", "ab1"]
    assert keys(mlpipelines("cache", "ls", "--json", "--limit", 1)) == ["cd3"]
    assert keys(mlpipelines("cache", "ls", "--json", "--pipeline", "churn")) == ["ab2", "ab1"]
    assert keys(mlpipelines("cache", "ls", "--json", "--step", "train")) == ["cd3", "ab1"]


@pytest.mark.usefixtures("index")
def test_nothing_remembered_is_an_empty_list(mlpipelines):
    assert keys(mlpipelines("cache", "ls", "--json")) == []
    assert mlpipelines("cache", "ls").code == 0


@pytest.mark.usefixtures("entries")
def test_the_table_of_what_is_remembered_has_a_line_for_each_entry(mlpipelines):
    lines = mlpipelines("cache", "ls").out.splitlines()

    assert lines[0].split() == ["key", "pipeline", "step", "made", "took", "size"]
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "cd3000000000 sales train 2026-03-01 14:30 90.0 s 2.0 KiB",
        "ab2000000000 churn report 2026-03-01 13:30 90.0 s 2.0 KiB",
        "ab1000000000 churn train 2026-03-01 12:30 90.0 s 2.0 KiB",
    ]


@pytest.mark.usefixtures("entries")
def test_an_entry_is_shown_whole_by_the_first_digits_of_its_key(mlpipelines):
    answer = mlpipelines("cache", "show", "ab1", "--json")

    assert answer.code == 0
    assert answer.json == {
        "fingerprint": f"{'ab1':0<64}",
        "pipeline": "churn",
        "step": "train",
        "step_type": "CommandStep",
        "created_at": "2026-03-01T12:30:00+00:00",
        "seconds": 90.0,
        "writer": "ann",
        "step_run": "mlp-ab1",
        "outputs": {"table": TABLE.to_dict()},
        "ingredients": ingredients(0.1),
    }
    assert f"{'ab1':0<64}" in mlpipelines("cache", "show", "ab1").out


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(("key", "count"), [("ab", "more than one"), ("ff", "no")])
def test_a_key_that_means_no_entry_or_several_is_refused(mlpipelines, key, count):
    answer = mlpipelines("cache", "show", key)

    assert answer.code != 0
    assert answer.err == f"error: {count} cache entry has a fingerprint that begins with {key!r}\n"


@pytest.mark.usefixtures("history")
def test_a_step_is_explained_against_the_nearest_run_that_made_outputs(mlpipelines):
    answer = mlpipelines("explain", "churn_dag", "train", "--run-id", "run3", "--json")

    assert answer.code == 0
    assert answer.json == {
        "dag_id": "churn_dag",
        "run_id": "run3",
        "step": "train",
        "state": "failed",
        "reason": "exit code 3",
        "seconds": 2.5,
        "seconds_saved": 0.0,
        "fingerprint": f"{'run3':0<64}",
        "compared_with": "run2",
        "differences": ["rate 0.2 -> 0.3"],
    }


@pytest.mark.usefixtures("history")
def test_without_a_run_the_newest_is_explained(mlpipelines):
    explained = mlpipelines("explain", "churn_dag", "train", "--json").json

    assert (explained["run_id"], explained["state"]) == ("run4", "reused")
    assert explained["compared_with"] == "run1"  # not run2, which is newer but differs
    assert explained["differences"] == []


@pytest.mark.usefixtures("history")
def test_the_first_run_is_compared_with_nothing(mlpipelines):
    answer = mlpipelines("explain", "churn_dag", "train", "--run-id", "run1")

    assert answer.out == "train ran in run1: never ran before in this pipeline\n"


@pytest.mark.usefixtures("history")
def test_an_explanation_for_people_says_what_differs(mlpipelines):
    answer = mlpipelines("explain", "churn_dag", "train", "--run-id", "run2")

    assert answer.out.splitlines() == [
        "train ran in run2: rate 0.1 -> 0.2",
        "Compared with run1:",
        "  - rate 0.1 -> 0.2",
    ]


@pytest.mark.usefixtures("history")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["churn_dag", "trian"],
            "nothing is known of step 'trian'.*'train'.*Did you mean 'train'\\?",
        ),
        (["sales_dag", "train"], "nothing is known of DAG 'sales_dag'"),
        (["churn_dag", "train", "--run-id", "run9"], "nothing is known of .* run 'run9'"),
    ],
)
def test_what_never_happened_cannot_be_explained(mlpipelines, arguments, message):
    answer = mlpipelines("explain", *arguments)

    assert answer.code == 2
    assert re.search(message, answer.err)
    assert answer.err.count("\n") == 1
