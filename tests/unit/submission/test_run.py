"""Runs: what each step did, read from tasks, plan and XComs of a source in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.definition.graph import OutputSpec
from airflow_mlpipelines.exceptions import SubmissionError
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.submission.run import PipelineRun, StepRun
from tests.helpers import make_graph, make_step

TABLE = Artifact("memory://store/clean/1", f"blake3:{'a' * 64}", 10, 1, "file", step_run="mlp-1")
MODEL = Artifact("memory://store/train/2", f"blake3:{'b' * 64}", 20, 3, "dir", step_run="mlp-2")
GRAPH = make_graph(
    make_step("clean"),
    make_step(
        "train",
        name="train.py",
        after=("clean",),
        outputs=(OutputSpec(name="model", datastore="store", pipeline_output_name="best_model"),),
    ),
    make_step("report", after=("train",)),
)
PLAN = RunPlan(
    steps={
        "clean": StepDecision(
            Decision.REUSE, "nothing changed", outputs={"out": TABLE}, seconds_saved=2.5
        ),
        "train": StepDecision(Decision.RUN, "rate 0.1 -> 0.2", MissReason.CHANGED),
        "report": StepDecision(
            Decision.LATER, "decided once train.py has run", MissReason.UPSTREAM_RUNS
        ),
    }
)


@dataclass
class MemorySource:
    """A run whose facts the test writes down.

    Attributes:
        states: Each task's state, or None before it has one.
        xcoms: By task and key.
        later: What the run turns into each time that its state is asked for.
    """

    state: str = "success"
    states: dict[str, str | None] = field(default_factory=dict)
    xcoms: dict[tuple[str, str], Any] = field(default_factory=dict)
    later: list[dict[str, Any]] = field(default_factory=list)
    dag_id: str = "flights"
    run_id: str = "run1"
    cancelled: bool = False

    def get_state(self) -> str:
        if self.later:
            for name, value in self.later.pop(0).items():
                setattr(self, name, value)
        return self.state

    def list_tasks(self) -> list[dict[str, Any]]:
        around = {"cache_sensor": "success", "finish": None}
        return [
            {"task_id": task, "state": state, "duration": 1.25}
            for task, state in {**around, **self.states}.items()
        ]

    def find_xcom(self, task_id: str, key: str) -> Any | None:
        return self.xcoms.get((task_id, key))

    def get_log(self, task_id: str, try_number: int) -> list[str]:
        return [f"{task_id} {try_number}"]

    def cancel(self) -> None:
        self.cancelled = True


def record(state, reason, seconds=0.0, **more):
    """Return what a step's task leaves in its XCom ``step_run``."""
    return {"state": state, "reason": reason, "seconds": seconds, **more}


def make_source(**states: str | None) -> MemorySource:
    """Return a finished run with the plan's XCom and these states of its tasks."""
    return MemorySource(states=states, xcoms={("cache_sensor", "plan"): PLAN.to_dict()})


def steps_of(source):
    return {step.task_id: step for step in PipelineRun(GRAPH, source).get_steps()}


# ---- what a step did ---------------------------------------------------------------------------


def test_a_step_that_the_plan_skipped_was_reused_with_its_outputs():
    step = steps_of(make_source(clean="skipped"))["clean"]

    assert step == StepRun(
        "clean", "clean", "reused", "nothing changed", 0.0, 2.5, {"out": TABLE.to_dict()}
    )
    assert step.is_reused
    assert step.get_output_data("out") == TABLE


def test_a_step_that_ran_has_its_reason_seconds_and_outputs():
    source = make_source(train="success")
    source.xcoms[("train", "step_run")] = record("ran", "rate 0.1 -> 0.2", 12.5)
    source.xcoms[("train", "return_value")] = {"model": MODEL.to_dict()}

    step = steps_of(source)["train"]

    assert (step.name, step.state, step.reason, step.seconds) == (
        "train.py",
        "ran",
        "rate 0.1 -> 0.2",
        12.5,
    )
    assert not step.is_reused
    assert step.get_output_data("model") == MODEL


def test_a_step_that_ran_and_makes_nothing_has_no_outputs():
    source = make_source(train="success")
    source.xcoms[("train", "step_run")] = record("ran", "never ran before in this pipeline", 1.0)

    assert steps_of(source)["train"].outputs == {}


def test_a_step_that_found_its_outputs_once_it_was_its_turn_was_reused():
    source = make_source(report="skipped")
    source.xcoms[("report", "step_run")] = record("reused", "same inputs", seconds_saved=4.0)
    source.xcoms[("report", "return_value")] = {"out": TABLE.to_dict()}

    step = steps_of(source)["report"]

    assert (step.state, step.reason, step.seconds, step.seconds_saved) == (
        "reused",
        "same inputs",
        0.0,
        4.0,
    )
    assert step.get_output_data("out") == TABLE


def test_a_failed_step_tells_why():
    source = make_source(train="failed")
    source.xcoms[("train", "step_run")] = record("failed", "step 'train.py': exit code 3")

    step = steps_of(source)["train"]

    assert (step.state, step.reason, step.seconds) == (
        "failed",
        "step 'train.py': exit code 3",
        1.25,
    )


def test_a_task_that_died_without_a_word_points_to_its_log():
    step = steps_of(make_source(train="failed"))["train"]

    assert (step.state, step.reason) == ("failed", "its task failed; see its log")


def test_a_step_behind_a_failed_one_has_not_started():
    step = steps_of(make_source(train="failed", report="upstream_failed"))["report"]

    assert (step.state, step.reason) == ("not_started", "a step before it failed")


def test_a_step_on_a_branch_that_was_not_taken_is_skipped():
    step = steps_of(make_source(train="skipped"))["train"]

    assert step.state == "skipped"
    assert step.outputs == {}


@pytest.mark.parametrize(
    ("task", "state"),
    [
        ("running", "running"),
        ("queued", "running"),
        ("deferred", "running"),
        ("up_for_retry", "running"),
        ("scheduled", "not_started"),
        (None, "not_started"),
    ],
)
def test_a_step_that_is_not_over_says_what_the_plan_expects(task, state):
    step = steps_of(make_source(train=task))["train"]

    assert (step.state, step.reason) == (state, "rate 0.1 -> 0.2")


def test_a_run_that_has_no_tasks_yet_has_all_its_steps():
    steps = PipelineRun(GRAPH, MemorySource("queued")).get_steps()

    assert [(step.task_id, step.state, step.reason) for step in steps] == [
        ("clean", "not_started", ""),
        ("train", "not_started", ""),
        ("report", "not_started", ""),
    ]


@pytest.mark.parametrize("plan", [{"version": 99}, {"version": 1}, "gone"])
def test_a_plan_that_cannot_be_read_leaves_what_the_tasks_say(plan):
    source = make_source(train="success", clean="running")
    source.xcoms[("cache_sensor", "plan")] = plan
    source.xcoms[("train", "step_run")] = record("ran", "rate 0.1 -> 0.2", 1.0)

    steps = steps_of(source)

    assert {name: step.state for name, step in steps.items()} == {
        "clean": "running",
        "train": "ran",
        "report": "not_started",
    }


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("ran", "Finished"),
        ("reused", "Finished"),
        ("skipped", "Finished"),
        ("failed", "Failed"),
        ("running", "Running"),
        ("not_started", "NotStarted"),
    ],
)
def test_a_steps_status_is_azure_mls_word(state, word):
    assert StepRun("clean", "clean", state).get_status() == word


# ---- what the run did --------------------------------------------------------------------------


@pytest.fixture
def finished():
    """A run that reused one step and ran two."""
    source = make_source(clean="skipped", train="success", report="success")
    source.xcoms[("train", "step_run")] = record("ran", "rate 0.1 -> 0.2", 12.34567)
    source.xcoms[("train", "return_value")] = {"model": MODEL.to_dict()}
    source.xcoms[("report", "step_run")] = record(
        "ran", "input 'from_train' has other content", 0.5
    )
    return source


def test_a_run_tells_what_its_steps_did_in_the_order_of_the_pipeline(finished):
    assert PipelineRun(GRAPH, finished).summary() == {
        "dag_id": "flights",
        "run_id": "run1",
        "state": "success",
        "steps": [
            {
                "name": "clean",
                "task_id": "clean",
                "state": "reused",
                "reason": "nothing changed",
                "seconds": 0.0,
                "outputs": {"out": TABLE.to_dict()},
            },
            {
                "name": "train.py",
                "task_id": "train",
                "state": "ran",
                "reason": "rate 0.1 -> 0.2",
                "seconds": 12.346,
                "outputs": {"model": MODEL.to_dict()},
            },
            {
                "name": "report",
                "task_id": "report",
                "state": "ran",
                "reason": "input 'from_train' has other content",
                "seconds": 0.5,
                "outputs": {},
            },
        ],
    }


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("queued", "NotStarted"),
        ("running", "Running"),
        ("success", "Finished"),
        ("failed", "Failed"),
    ],
)
def test_a_runs_status_is_azure_mls_word(state, word):
    assert PipelineRun(GRAPH, MemorySource(state)).get_status() == word


def test_a_step_is_found_by_its_name_and_by_its_task(finished):
    run = PipelineRun(GRAPH, finished)

    assert [step.task_id for step in run.find_step_run("train.py")] == ["train"]
    assert [step.task_id for step in run.find_step_run("train")] == ["train"]
    assert run.find_step_run("nothing") == []


def test_what_the_pipeline_offers_is_had_by_its_name(finished):
    assert PipelineRun(GRAPH, finished).get_pipeline_output("best_model") == MODEL


def test_what_the_pipeline_offers_is_not_that_of_a_step_named_like_the_others_task():
    offering = GRAPH.step("train").model_copy(update={"inputs": ()})
    graph = make_graph(make_step("train_2", name="train"), offering)
    source = MemorySource(states={"train_2": "success", "train": "success"})
    for task, made in (("train_2", TABLE), ("train", MODEL)):
        source.xcoms[(task, "step_run")] = record("ran", "never ran before in this pipeline", 1.0)
        source.xcoms[(task, "return_value")] = {"model": made.to_dict()}

    assert PipelineRun(graph, source).get_pipeline_output("best_model") == MODEL


def test_an_output_that_the_pipeline_does_not_offer_names_those_that_it_does(finished):
    message = "pipeline 'pipeline' offers no output 'model'; it offers ['best_model']"

    with pytest.raises(SubmissionError, match=re.escape(message)):
        PipelineRun(GRAPH, finished).get_pipeline_output("model")


def test_an_offered_output_that_was_not_made_is_an_error():
    run = PipelineRun(GRAPH, make_source(train="failed"))

    with pytest.raises(SubmissionError, match=r"step 'train.py' has no output 'model' in this run"):
        run.get_pipeline_output("best_model")


def test_an_output_that_a_step_lacks_names_those_that_it_has(finished):
    (step,) = PipelineRun(GRAPH, finished).find_step_run("train")

    with pytest.raises(
        SubmissionError, match=r"has no output 'modle' in this run; it has \['model'\]"
    ):
        step.get_output_data("modle")


def test_logs_and_the_end_of_a_run_are_the_sources_affair(finished):
    run = PipelineRun(GRAPH, finished)

    run.cancel()

    assert finished.cancelled
    assert run.get_log("train", 2) == ["train 2"]


# ---- following ---------------------------------------------------------------------------------


@pytest.fixture
def going_on(finished):
    """A run that is looked at three times: one step is over, then two, then all."""
    finished.state = "running"
    finished.later = [
        {"states": {"clean": "skipped", "train": "running"}},
        {"states": {"clean": "skipped", "train": "success", "report": "queued"}},
        {"states": finished.states, "state": "success"},
    ]
    return finished


def test_every_step_is_reported_once_when_it_is_over(going_on):
    told = []

    PipelineRun(GRAPH, going_on).follow(told.append)

    assert [(step.task_id, step.state) for step in told] == [
        ("clean", "reused"),
        ("train", "ran"),
        ("report", "ran"),
    ]


def test_the_end_of_a_run_reports_the_steps_that_never_started():
    told = []
    source = make_source(clean="skipped", train="failed", report="upstream_failed")
    source.state = "failed"

    PipelineRun(GRAPH, source).follow(told.append)

    assert [(step.task_id, step.state) for step in told] == [
        ("clean", "reused"),
        ("train", "failed"),
        ("report", "not_started"),
    ]


def test_waiting_returns_the_status_and_tells_each_step_on_standard_error(finished, capsys):
    assert PipelineRun(GRAPH, finished).wait_for_completion() == "Finished"

    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split()[:2] for line in told.err.splitlines()] == [
        ["reused", "clean"],
        ["ran", "train.py"],
        ["ran", "report"],
    ]


def test_waiting_without_output_tells_nothing(finished, capsys):
    PipelineRun(GRAPH, finished).wait_for_completion(show_output=False)

    assert capsys.readouterr() == ("", "")


def test_waiting_for_a_run_that_fails_names_the_steps_that_failed():
    source = make_source(clean="failed", train="failed", report="upstream_failed")
    source.state = "failed"
    run = PipelineRun(GRAPH, source)

    with pytest.raises(SubmissionError, match=r"^run run1 of flights failed: 'clean', 'train.py'$"):
        run.wait_for_completion(show_output=False)
    assert run.wait_for_completion(show_output=False, raise_on_error=False) == "Failed"


def test_a_run_that_fails_around_its_steps_says_so():
    source = MemorySource("failed", {"cache_sensor": "failed", "clean": "upstream_failed"})

    with pytest.raises(SubmissionError, match="failed: a task around the steps"):
        PipelineRun(GRAPH, source).wait_for_completion(show_output=False)


def test_waiting_ends_when_the_time_is_over():
    run = PipelineRun(GRAPH, MemorySource("running"))

    with pytest.raises(SubmissionError, match=r"run run1 is not over after 0\.01 s"):
        run.wait_for_completion(show_output=False, timeout_seconds=0.01)
