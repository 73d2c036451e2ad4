"""What a step can rely on wherever it runs: its inputs stay as they are, its outputs are committed or not at all.

As :mod:`tests.unit.compute.launcher_contract`, but a whole step run: staged from datastores, launched, committed to
one that the compute can't see.
"""

from __future__ import annotations

import os
import threading
import uuid
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.definition.graph import (
    DatastoreSpec,
    ExternalDataSpec,
    InputSpec,
    LiteralPart,
    OutputSpec,
)
from airflow_mlpipelines.exceptions import StepFailedError
from airflow_mlpipelines.execution.handles import FileHandle
from airflow_mlpipelines.execution.identity import TaskIdentity
from airflow_mlpipelines.execution.program import StepProgram, release
from airflow_mlpipelines.execution.services import Services
from airflow_mlpipelines.runtime.metrics import read_metrics
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.kept import RUN_FILES
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import commit_output
from tests.helpers import make_graph, make_step
from tests.unit.compute.launcher_contract import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_mlpipelines.compute.base import Launcher

# Tries to change an input in every way, and says which ones worked.
MEDDLE = """
import os
place = os.environ["MLP_INPUT_TABLE"]
ways = {
    "write": lambda: open(place + "/rows.csv", "a").write("more"),
    "add": lambda: open(place + "/new.csv", "w").close(),
    "permit": lambda: os.chmod(place + "/rows.csv", 0o777),
    "remove": lambda: os.remove(place + "/rows.csv"),
}
assert open(place + "/rows.csv").read() == "1,2"
for name, way in ways.items():
    try:
        way()
        print(name)
    except OSError:
        pass
os.makedirs(os.environ["MLP_OUTPUT_OUT"])
open(os.environ["MLP_OUTPUT_OUT"] + "/done", "w").close()
"""
# Writes half of its output before it fails, if it is told to.
WRITE = """
import os, sys
out = os.environ["MLP_OUTPUT_OUT"]
os.makedirs(out + "/part")
open(out + "/part/1.txt", "w").write("one")
open("logs/train.log", "w").write("epoch 1")
open("outputs/notes.txt", "w").write("so far")
if {fails}:
    sys.exit(1)
open(out + "/part/2.txt", "w").write("two")
"""
# Goes on only once somebody has seen its metric.
MEASURE = """
import os, time
from airflow_mlpipelines import Run
Run.get_context(allow_offline=False).log("loss", 0.5)
while not os.path.exists(os.environ["MLP_RUN_DIR"] + "/seen"):
    time.sleep(0.05)
open(os.environ["MLP_OUTPUT_OUT"], "w").close()
"""


class StepBench:
    """One step run, with an input on a file store and an output on a store that only the worker reaches."""

    def __init__(self, root: Path, launcher: Launcher, input_mode: str) -> None:
        self.launcher = launcher
        self.lines: list[str] = []
        self.handle = FileHandle(root / "handle.json")
        self.identity = TaskIdentity("contract", uuid.uuid4().hex, "train")
        self.step_run_id = self.identity.step_run_id
        self.directory = self.identity.directory("pipeline", "train")
        self._root = root
        self._input_mode = input_mode
        specs = {
            "store": DatastoreSpec(name="store", url=(root / "store").as_uri()),
            "away": DatastoreSpec(name="away", url=f"memory://{uuid.uuid4().hex}"),
        }
        self.specs = specs
        self.stores = StoreSet(
            [open_store(each.name, each.url) for each in specs.values()], "store"
        )
        self.original = self.stores["store"].local_path("given/table")
        self.original.mkdir(parents=True)
        (self.original / "rows.csv").write_text("1,2")
        self.table = commit_output(
            self.stores["store"], "given/table", self.original, step_run="before"
        )

    @property
    def run_directory(self) -> Path:
        """The directory on the worker in which the program's metrics arrive."""
        return self._root / "home" / "work" / self.step_run_id / "run"

    def run(self, program: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a Python program as the step; return its outputs, committed, and its metrics."""
        source = ExternalDataSpec(name="table", datastore="store", path="given/table")
        step = make_step(
            "train",
            command=tuple((LiteralPart(text=text),) for text in ("python", "-c", program)),
            inputs=(InputSpec(name="table", source=source, mode=self._input_mode),),
            outputs=(OutputSpec(name="out", datastore="away"),),
        )
        compute = self.launcher._compute.model_copy(update={"name": "local"})
        graph = make_graph(step, datastores=self.specs, computes={"local": compute})
        decision = StepDecision(Decision.RUN, "it is a test", miss=MissReason.NOT_CACHEABLE)
        services = Services(
            index=MetadataIndex(f"sqlite:///{self._root}/metadata.db"),
            stores=self.stores,
            launcher=self.launcher,
            handle=self.handle,
            emit=self.lines.append,
            blobs=BlobCache(self._root / "blobs"),
        )
        made = StepProgram(
            step,
            graph,
            identity=self.identity,
            plan=RunPlan({"train": decision}, environments={"train": ""}),
            inputs={"table": self.table},
            services=services,
        )
        with ExitStack() as held:
            result = made.run(held)
        release(services, self.identity, compute)  # as a runner does once all is remembered
        return result

    def kept(self) -> dict[str, str]:
        """Return the files that were kept with the run, and what is in them."""
        root = self.stores["store"].local_path(f"{self.directory}/{RUN_FILES}")
        return {
            str(file.relative_to(root)): file.read_text()
            for file in sorted(root.rglob("*"))
            if file.is_file()
        }


class StepContract(ABC):
    """The tests. A launcher passes them as those of the launchers' contract."""

    input_mode = "mount"
    """How the step takes its input."""
    inputs_are_read_only = True
    """Whether the compute itself keeps a program from writing to its inputs. If not, its input is a copy of its own
    (``mode="download"``), which it may change."""

    @abstractmethod
    def make_launcher(self) -> Launcher:
        """Return a launcher for one try of one step run."""

    def find_left(self, step_run_id: str) -> list[str]:
        """Return what is left of a step run on the compute, and remove it."""
        del step_run_id
        return []

    def touch(self, step_bench: StepBench, name: str) -> None:
        """Make an empty file in the run directory, where the program sees it."""
        (step_bench.run_directory / name).touch()

    @pytest.fixture
    def step_bench(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepBench]:
        monkeypatch.setenv("MLPIPELINES_HOME", str(tmp_path / "home"))
        bench = StepBench(tmp_path, self.make_launcher(), self.input_mode)
        yield bench
        assert self.find_left(bench.step_run_id) == []

    def test_what_a_program_does_to_its_input_changes_it_for_nobody_else(
        self, step_bench: StepBench
    ) -> None:
        step_bench.run(MEDDLE)
        worked = [] if self.inputs_are_read_only else ["write", "add", "permit", "remove"]
        assert step_bench.lines == worked
        assert {file.name: file.read_text() for file in step_bench.original.iterdir()} == {
            "rows.csv": "1,2"
        }

    def test_outputs_are_committed_and_outputs_and_logs_kept(self, step_bench: StepBench) -> None:
        made, _ = step_bench.run(WRITE.format(fails=False))
        assert (made["out"].files, made["out"].size) == (2, 6)
        away = step_bench.stores["away"]
        path = away.path_of(made["out"].uri)
        assert path is not None
        assert away.read_bytes(f"{path}/part/2.txt") == b"two"
        assert step_bench.kept() == {"logs/train.log": "epoch 1", "outputs/notes.txt": "so far"}

    def test_of_a_program_that_fails_no_output_is_committed_but_outputs_and_logs_are_kept(
        self, step_bench: StepBench
    ) -> None:
        with pytest.raises(StepFailedError, match="exit code 1"):
            step_bench.run(WRITE.format(fails=True))
        assert not step_bench.stores["away"].exists(step_bench.directory)
        assert step_bench.kept() == {"logs/train.log": "epoch 1", "outputs/notes.txt": "so far"}

    def test_metrics_can_be_read_while_the_program_runs(self, step_bench: StepBench) -> None:
        seen: list[dict[str, Any]] = []

        def look() -> None:
            def arrived() -> bool:
                directory = step_bench.run_directory
                return directory.is_dir() and bool(read_metrics(directory))

            try:
                wait_until(arrived, seconds=60)
                seen.append(read_metrics(step_bench.run_directory))
            finally:
                self.touch(step_bench, "seen")

        thread = threading.Thread(target=look)
        thread.start()
        try:
            _, metrics = step_bench.run(MEASURE)
        finally:
            thread.join()
        assert seen == [{"loss": 0.5}]
        assert metrics == {"loss": 0.5}


def unprivileged_uid() -> int:
    """Return a user other than root whom this worker may run a container as."""
    return os.getuid() or 4321
