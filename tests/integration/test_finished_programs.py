"""A program has ended well and its store is away: nothing of its work is lost. On a real S3 server."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines import settings
from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.compute.base import Launcher, ProcessPaths, ResolvedEnvironment
from airflow_mlpipelines.definition.graph import DatastoreSpec, OutputSpec
from airflow_mlpipelines.exceptions import DataError, StoreError
from airflow_mlpipelines.execution.handles import FileHandle
from airflow_mlpipelines.execution.identity import TaskIdentity
from airflow_mlpipelines.execution.program import StepProgram
from airflow_mlpipelines.execution.services import Services
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from tests.helpers import make_graph, make_step
from tests.integration.breaking_proxy import BreakingProxy
from tests.integration.versitygw_server import S3_KEYS, find_versitygw, run_versitygw
from tests.parts import missing

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.s3

PLAIN = ResolvedEnvironment(description={"image": "python"})
SIZE = 1 << 20


class _Launcher(Launcher):
    """Counts its runs; each makes a report, a model and a metric."""

    def __init__(self) -> None:
        self.runs = 0
        self.makes_model = True

    def resolve_environment(self, environment: Any) -> ResolvedEnvironment:
        return PLAIN

    def prepare_environment(self, environment: Any, resolved: Any, *, emit: Any) -> Any:
        return resolved

    def process_paths(self, stage: Any, environment: Any) -> ProcessPaths:
        outputs = {name: str(path) for name, path in stage.outputs.items()}
        places = (str(stage.code), str(stage.runtime), str(stage.run))
        return ProcessPaths(*places, inputs={}, outputs=outputs, python=sys.executable)

    def recover(self, step_run_id: str, handle: Any) -> bool:
        return False

    def run(self, launch: Any, *, emit: Any, handle: Any) -> None:
        self.runs += 1
        launch.stage.outputs["a_report"].write_text(f"of run {self.runs}")
        if self.makes_model:
            launch.stage.outputs["b_model"].write_bytes(os.urandom(SIZE))

    def kill(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    program = find_versitygw()
    if program is None:
        missing("no versitygw: .ci/versitygw.sh builds it")
    root = tmp_path_factory.mktemp("served")
    (root / "team").mkdir()
    with run_versitygw(program, root) as url, BreakingProxy(int(url.rpartition(":")[2])) as proxy:
        yield root, proxy


@pytest.fixture
def proxy(served):
    yield served[1]
    served[1].heal()


class _Step:
    """One step of one run, tried as often as a test likes."""

    def __init__(self, folder: Path, port: int) -> None:
        self.launcher = _Launcher()
        self.lines: list[str] = []
        client = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"}
        quick = {"retries": {"max_attempts": 0}, "connect_timeout": 5, "read_timeout": 60}
        keys = {"key": S3_KEYS[0], "secret": S3_KEYS[1]}
        url = f"s3://team/{folder.name}"
        options = {**keys, "client_kwargs": client, "config_kwargs": quick}
        self.store = open_store("lake", url, credentials=options)
        self._folder, self._url = folder, url

    def run(self, try_number: int, fingerprint: str | None = "f1", retries: int = 3) -> Any:
        outputs = tuple(
            OutputSpec(name=name, datastore="lake", is_directory=False)
            for name in ("a_report", "b_model")
        )
        step = make_step("train", command=()).model_copy(update={"outputs": outputs})
        stores = {"lake": DatastoreSpec(name="lake", url=self._url)}
        decision = StepDecision(Decision.RUN, "never ran before", miss=MissReason.NEVER_RUN)
        program = StepProgram(
            step,
            make_graph(step, datastores=stores),
            identity=TaskIdentity("dag", "run", "train", attempt=retries, try_number=try_number),
            plan=RunPlan({"train": decision}, environments={"train": PLAIN.digest}),
            inputs={},
            services=Services(
                index=MetadataIndex(f"sqlite:///{self._folder}/metadata.db"),
                stores=StoreSet([self.store], default="lake"),
                launcher=self.launcher,
                handle=FileHandle(self._folder / "handle.json"),
                emit=self.lines.append,
                blobs=BlobCache(self._folder / "blobs"),
            ),
        )
        with ExitStack() as held:
            return program.run(held, fingerprint=fingerprint)[0]

    def left(self) -> list[str]:
        work = settings.work_directory()
        return sorted(path.name for path in work.iterdir()) if work.exists() else []


@pytest.fixture
def step(tmp_path, proxy):
    return _Step(tmp_path, proxy.port)


def break_off(proxy):
    """Let the report through, and the model not."""
    proxy.limit("up", SIZE // 2, "drop")


def test_the_next_try_sends_what_was_made_and_runs_nothing(step, proxy):
    break_off(proxy)
    with pytest.raises(StoreError, match="output 'b_model'"):
        step.run(1)
    assert step.lines[-1].endswith("for the next try to send")
    proxy.heal()
    outputs = step.run(2)
    assert step.launcher.runs == 1
    _, report = StoreSet([step.store], default="lake").locate(outputs["a_report"].uri)
    assert step.store.read_bytes(report) == b"of run 1"
    assert outputs["b_model"].size == SIZE
    assert step.left() == []


def test_without_another_try_nothing_stays_on_the_worker(step, proxy):
    break_off(proxy)
    with pytest.raises(StoreError):
        step.run(4)
    assert step.left() == []


@pytest.mark.parametrize("fingerprint", ["f2", None], ids=["another", "none"])
def test_another_program_runs(step, proxy, fingerprint):
    break_off(proxy)
    with pytest.raises(StoreError):
        step.run(1)
    proxy.heal()
    step.run(2, fingerprint)
    assert step.launcher.runs == 2


def test_an_output_that_was_not_made_is_the_programs_fault(step):
    step.launcher.makes_model = False
    with pytest.raises(DataError, match="was not made"):
        step.run(1)
    assert step.left() == []


def test_what_nobody_came_back_for_goes_after_a_week(step, proxy):
    break_off(proxy)
    with pytest.raises(StoreError):
        step.run(1)
    proxy.heal()
    (note,) = settings.work_directory().glob("*/finished.json")
    week_ago = time.time() - 8 * 24 * 3600
    os.utime(note, (week_ago, week_ago))
    step.run(2)
    assert step.launcher.runs == 2
