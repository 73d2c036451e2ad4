"""Running a step's program: what has to be there for one that begins, and what for one that runs already."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines import settings
from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.compute.base import (
    Launcher,
    ProcessPaths,
    RelaunchError,
    ResolvedEnvironment,
)
from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, DataError
from airflow_mlpipelines.execution import program
from airflow_mlpipelines.execution.handles import FileHandle
from airflow_mlpipelines.execution.identity import TaskIdentity
from airflow_mlpipelines.execution.program import StepProgram
from airflow_mlpipelines.execution.services import Services
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from tests.helpers import make_graph, make_step

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import Stage

KNOWN = ResolvedEnvironment({"kind": "image", "digest": "definition:x"}, image="mlpipelines/env:x")
AWAY = "the registry registry.example.com does not answer"


class _Launcher(Launcher):
    """A compute elsewhere, whose registry is away; a program may be running on it since an earlier try."""

    carries_files = True

    def __init__(self, *, runs: bool, lost: bool = False, at_work: str | None = None) -> None:
        self.runs, self.lost, self.asked, self.at_work = runs, lost, 0, at_work

    def resolve_environment(self, environment: Any) -> ResolvedEnvironment:
        return KNOWN

    def prepare_environment(self, environment: Any, resolved: Any, *, emit: Any) -> Any:
        self.asked += 1
        if self.at_work is not None:
            return resolved
        raise ComputeUnavailableError(AWAY)

    def process_paths(self, stage: Stage, environment: ResolvedEnvironment) -> ProcessPaths:
        outputs = {name: str(path) for name, path in stage.outputs.items()}
        places = (str(stage.code), str(stage.runtime), str(stage.run))
        return ProcessPaths(*places, inputs={}, outputs=outputs, python=sys.executable)

    def recover(self, step_run_id: str, handle: Any) -> bool:
        return self.runs

    def run(self, launch: Any, *, emit: Any, handle: Any) -> None:
        if self.at_work is not None:
            handle.set({"id": 1} if self.at_work == "alive" else None)
            raise ComputeUnavailableError(AWAY)
        if self.lost:
            raise RelaunchError("its node was taken", pause=0)
        output = Path(launch.stage.outputs["out"])
        output.parent.mkdir(parents=True)
        output.write_text("made")

    def kill(self) -> None:
        pass


def run(folder: Path, launcher: Launcher) -> tuple[Any, list[str]]:
    lines: list[str] = []
    step = make_step("train", command=())
    store = DatastoreSpec(name="store", url=(folder / "data").as_uri())
    graph = make_graph(step, datastores={"store": store})
    decision = StepDecision(Decision.RUN, "never ran before", miss=MissReason.NEVER_RUN)
    program = StepProgram(
        step,
        graph,
        identity=TaskIdentity("dag", "run", "train"),
        plan=RunPlan({"train": decision}, environments={"train": KNOWN.digest}),
        inputs={},
        services=Services(
            index=MetadataIndex(f"sqlite:///{folder}/metadata.db"),
            stores=StoreSet([open_store(store.name, store.url)], default="store"),
            launcher=launcher,
            handle=FileHandle(folder / "handle.json"),
            emit=lines.append,
            blobs=BlobCache(folder / "blobs"),
        ),
    )
    with ExitStack() as held:
        return program.run(held), lines


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))


def test_a_program_that_begins_needs_its_environment(tmp_path: Path) -> None:
    with pytest.raises(ComputeUnavailableError, match=AWAY):
        run(tmp_path, _Launcher(runs=False))


def test_what_a_program_that_runs_already_has_made_does_not_hang_on_a_registry(
    tmp_path: Path,
) -> None:
    (outputs, _), lines = run(tmp_path, _Launcher(runs=True))
    assert outputs["out"].files == 1
    assert lines == []


def test_a_program_that_was_lost_since_needs_its_environment_again(tmp_path: Path) -> None:
    launcher = _Launcher(runs=True, lost=True)
    with pytest.raises(ComputeUnavailableError, match=AWAY):
        run(tmp_path, launcher)
    assert launcher.asked == 1


class _Here(_Launcher):
    """A compute whose programs work in the directories of the worker."""

    carries_files = False


def left() -> list[str]:
    work = settings.work_directory()
    return [path.name for path in work.iterdir()] if work.exists() else []


@pytest.mark.parametrize(
    ("launcher", "stays"),
    [
        (_Launcher(runs=False, at_work="alive"), False),
        (_Launcher(runs=False, at_work="over"), False),
        (_Here(runs=False, at_work="over"), False),
        (_Here(runs=False, at_work="alive"), True),
    ],
    ids=["alive elsewhere", "over elsewhere", "over here", "alive here"],
)
def test_a_compute_that_goes_away_leaves_directories_only_where_a_program_may_be_alive(
    tmp_path: Path, launcher: Launcher, stays: bool
) -> None:
    with pytest.raises(ComputeUnavailableError, match=AWAY):
        run(tmp_path, launcher)
    assert bool(left()) is stays


def test_an_input_that_can_not_be_had_leaves_no_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(workplace: Any, *_: Any, **__: Any) -> None:
        workplace.stage.run.mkdir(parents=True)
        raise DataError("it is gone")

    monkeypatch.setattr(program, "fill_stage", fail)
    with pytest.raises(DataError):
        run(tmp_path, _Here(runs=False, at_work="over"))
    assert left() == []
    with pytest.raises(DataError):
        run(tmp_path, _Here(runs=True, at_work="over"))
    assert len(left()) == 1  # a program is at work there
