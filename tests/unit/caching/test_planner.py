"""Plans: what is reused, what runs, what is decided later, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa

from airflow_mlpipelines.caching.closure import CodeDigest
from airflow_mlpipelines.caching.decision import Decision, MissReason
from airflow_mlpipelines.caching.fingerprint import step_fingerprint
from airflow_mlpipelines.caching.index import CacheEntry, MetadataIndex, StepRunRecord
from airflow_mlpipelines.caching.planner import (
    PlanRequest,
    StepEnvironment,
    external_key,
    plan_steps,
)
from airflow_mlpipelines.definition.graph import (
    ExternalDataSpec,
    InputSpec,
    ParameterRef,
    StepOutputRef,
)
from airflow_mlpipelines.storage.artifact import Artifact
from tests.helpers import make_graph, make_step

RAW = ExternalDataSpec(name="raw", datastore="store", path="raw.csv")


def make_digest(content: str) -> str:
    return f"blake3:{content.encode().hex():0>64}"


def pinned(content: str) -> Artifact:
    return Artifact("memory://store/raw.csv", make_digest(content), 1, 1, "file")


def make_code(**files: str) -> CodeDigest:
    names = {f"{name}.py": digest for name, digest in files.items()}
    return CodeDigest(f"{'-'.join(files.values()):0>64}", names)


class World:
    """A pipeline ``clean -> train -> report`` beside ``stats``, its index and its store."""

    def __init__(self, path):
        self.index = MetadataIndex(f"sqlite:///{path}/metadata.db")
        self.graph = make_graph(
            make_step("clean", inputs=(InputSpec(name="raw", source=RAW),)),
            make_step("stats", inputs=(InputSpec(name="raw", source=RAW),), script="stats.py"),
            make_step("train", after=("clean",), params={"rate": ParameterRef(name="rate")}),
            make_step("report", after=("train",)),
        )
        names = [step.id for step in self.graph.steps]
        self.request = PlanRequest(
            graph=self.graph,
            parameters={"rate": 0.1, "other": 1},
            code={name: make_code(main="1") for name in names},
            environments={name: StepEnvironment("e" * 64) for name in names},
            external={external_key(RAW): pinned("raw")},
            snapshots={},
        )
        self.gone: dict[str, str] = {}
        self.verified: list[list[str]] = []

    def plan(self, **changes):
        return plan_steps(replace(self.request, **changes), index=self.index, verify=self.verify)

    def verify(self, artifacts):
        self.verified.append([artifact.uri for artifact in artifacts])
        return [(item, self.gone[item.uri]) for item in artifacts if item.uri in self.gone]

    def run(self, run="1", *, contents=None, remember=True, **changes) -> None:
        """Be as after a run; each step's output holds ``contents``, or the step's id."""
        request = replace(self.request, **changes)
        made: dict[str, Artifact] = {}
        for step in self.graph.steps:
            code = request.code[step.id]
            inputs = {}
            for item in step.inputs:
                if isinstance(item.source, StepOutputRef):
                    inputs[item.name] = made[item.source.step].digest
                else:
                    artifact = request.external[external_key(item.source)]
                    inputs[item.name] = artifact.digest if artifact else None
            fingerprint = step_fingerprint(
                step,
                code=code.digest,
                environment=request.environments[step.id].digest,
                parameters=request.parameters,
                inputs=inputs,
                destinations={"store": "memory://store"},
            )
            content = (contents or {}).get(step.id, step.id)
            made[step.id] = Artifact(
                f"memory://store/{step.id}/{run}", make_digest(content), 1, 1, "file"
            )
            common = {
                "fingerprint": fingerprint.digest,
                "pipeline": self.graph.name,
                "step": step.id,
                "outputs": {"out": made[step.id]},
                "ingredients": fingerprint.ingredients,
                "seconds": 2.0,
                "step_run": f"mlp-{step.id}-{run}",
            }
            if remember:
                self.index.put_entry(CacheEntry(step_type=step.type, writer="test", **common))
            self.index.record_step_runs(
                [
                    StepRunRecord(
                        dag_id="dag", run_id=run, task_id=step.id, state="ran", reason="", **common
                    )
                ]
            )
        self.index.put_contents({code.digest: code.to_content() for code in request.code.values()})


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def decisions(plan):
    return {step: str(item.decision) for step, item in plan.steps.items()}


def test_what_never_ran_runs_and_what_follows_is_decided_later(world):
    plan = world.plan()

    assert decisions(plan) == {"clean": "run", "stats": "run", "train": "later", "report": "later"}
    assert plan.steps["clean"].miss is MissReason.NEVER_RUN
    assert plan.steps["clean"].reason == "never ran before in this pipeline"
    assert plan.steps["train"].miss is MissReason.UPSTREAM_RUNS
    assert plan.steps["train"].reason == "decided once clean has run"


def test_nothing_changed_and_everything_is_reused(world):
    world.run()

    plan = world.plan()

    assert set(decisions(plan).values()) == {"reuse"}
    train = plan.steps["train"]
    assert train.outputs["out"].uri == "memory://store/train/1"
    assert train.step_run == "mlp-train-1"
    assert train.seconds_saved == 2.0
    assert train.reason.startswith("nothing changed since 20")
    assert train.miss is None
    assert world.verified == [[f"memory://store/{step.id}/1" for step in world.graph.steps]]


def test_a_chain_of_reused_steps_is_one_query(world):
    world.run()
    statements = []
    sa.event.listen(
        world.index.engine, "before_cursor_execute", lambda *call: statements.append(call[2])
    )

    world.plan()

    assert len([text for text in statements if "SELECT" in text]) == 1


def test_a_parameter_runs_only_the_steps_that_use_it(world):
    world.run()

    plan = world.plan(parameters={"rate": 0.2, "other": 2})

    assert decisions(plan) == {
        "clean": "reuse",
        "stats": "reuse",
        "train": "run",
        "report": "later",
    }
    assert plan.steps["train"].miss is MissReason.CHANGED
    assert plan.steps["train"].reason == "rate 0.1 -> 0.2"


def test_code_is_explained_by_its_files(world):
    world.run()

    plan = world.plan(code={**world.request.code, "clean": make_code(main="1", helpers="2")})

    assert plan.steps["clean"].reason == "helpers.py is new"


def test_an_environment_that_nobody_has_seen_before_is_explained(world):
    world.index.put_contents({"e" * 64: {"kind": "python", "packages": {"pandas": "2.2.3"}}})
    world.run()

    plan = world.plan(
        environments={**world.request.environments, "stats": StepEnvironment("f" * 64)},
        contents={"f" * 64: {"kind": "python", "packages": {"pandas": "2.3.0"}}},
    )

    assert plan.steps["stats"].reason == "pandas 2.2.3 -> 2.3.0"


def test_other_input_content_runs_its_readers(world):
    world.run()

    plan = world.plan(external={external_key(RAW): pinned("other")})

    assert decisions(plan) == {"clean": "run", "stats": "run", "train": "later", "report": "later"}
    assert plan.steps["clean"].reason == "input 'raw' has other content"


def test_external_data_that_is_absent_is_an_input_of_its_own(world):
    world.run(external={external_key(RAW): None})

    assert decisions(world.plan())["clean"] == "run"
    assert set(decisions(world.plan(external={external_key(RAW): None})).values()) == {"reuse"}


def test_a_change_put_back_is_reused_again(world):
    world.run("1")
    world.run("2", parameters={"rate": 0.2, "other": 1}, contents={"train": "another"})

    plan = world.plan()

    assert set(decisions(plan).values()) == {"reuse"}
    assert plan.steps["train"].outputs["out"].uri == "memory://store/train/1"


def test_entries_of_another_pipeline_are_reused(world):
    world.run()
    renamed = replace(
        world.request, graph=world.graph.model_copy(update={"name": "another_pipeline"})
    )

    plan = plan_steps(renamed, index=world.index, verify=world.verify)

    assert set(decisions(plan).values()) == {"reuse"}


def test_a_step_with_another_name_is_reused(world):
    world.run()
    steps = [make_step("tidy", inputs=(InputSpec(name="raw", source=RAW),))]
    renamed = replace(
        world.request,
        graph=make_graph(*steps),
        code={"tidy": make_code(main="1")},
        environments={"tidy": StepEnvironment("e" * 64)},
    )

    plan = plan_steps(renamed, index=world.index, verify=world.verify)

    assert plan.steps["tidy"].decision is Decision.REUSE


def test_a_step_whose_output_is_gone_runs_and_what_follows_is_decided_later(world):
    world.run()
    world.gone = {"memory://store/clean/1": "memory://store/clean/1 is gone"}

    plan = world.plan()

    assert decisions(plan) == {
        "clean": "run",
        "stats": "reuse",
        "train": "later",
        "report": "later",
    }
    assert plan.steps["clean"].miss is MissReason.OUTPUT_GONE
    assert plan.steps["clean"].reason == "output 'out': memory://store/clean/1 is gone"
    assert plan.steps["clean"].outputs == {}
    assert len(world.verified) == 1


def test_an_entry_that_lacks_an_output_of_the_step_is_a_miss(world):
    world.run()
    entry = next(item for item in world.index.list_entries() if item.step == "clean")
    world.index.put_entry(replace(entry, outputs={}))

    plan = world.plan()

    assert plan.steps["clean"].miss is MissReason.OUTPUT_GONE
    assert plan.steps["clean"].reason == "output 'out' is not remembered"


def test_regenerated_steps_run_and_what_follows_is_decided_later(world):
    world.run()

    plan = world.plan(regenerate=["train"])

    assert decisions(plan) == {
        "clean": "reuse",
        "stats": "reuse",
        "train": "run",
        "report": "later",
    }
    assert plan.steps["train"].miss is MissReason.REGENERATE
    assert "regenerate_outputs" in plan.steps["train"].reason


def test_a_step_that_may_not_be_reused_runs(world):
    world.run()
    steps = [
        step.model_copy(update={"allow_reuse": step.id != "clean"}) for step in world.graph.steps
    ]

    plan = world.plan(graph=make_graph(*steps))

    assert plan.steps["clean"].miss is MissReason.REUSE_OFF
    assert decisions(plan)["train"] == "later"


def test_nothing_is_reused_on_an_environment_that_cannot_be_pinned(world):
    world.run()
    loose = StepEnvironment("e" * 64, cacheable=False, problem="the image has no digest")

    plan = world.plan(environments={**world.request.environments, "stats": loose})

    assert plan.steps["stats"].miss is MissReason.NOT_CACHEABLE
    assert plan.steps["stats"].reason == "nothing can be reused: the image has no digest"


def test_a_step_that_ran_but_left_no_entry_says_so(world):
    world.run(remember=False)

    assert world.plan().steps["clean"].reason == "its earlier outputs are not remembered"


def test_the_plan_keeps_what_was_pinned(world):
    plan = world.plan()

    assert plan.external == {external_key(RAW): pinned("raw")}
    assert plan.environments["clean"] == "e" * 64
    assert plan.code["clean"] == make_code(main="1").digest
    assert plan.parameters == {"rate": 0.1, "other": 1}
    assert list(plan.steps) == ["clean", "stats", "train", "report"]
