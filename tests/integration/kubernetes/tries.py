"""A step of one run on a real cluster, carried out by one worker after the other, each with a disk of its own."""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher
from airflow_mlpipelines.definition.graph import (
    DatastoreSpec,
    DistributedSpec,
    KubernetesComputeSpec,
    LiteralPart,
    OutputSpec,
)
from airflow_mlpipelines.execution import program
from airflow_mlpipelines.execution.handles import FileHandle
from airflow_mlpipelines.execution.identity import TaskIdentity
from airflow_mlpipelines.execution.services import Services
from airflow_mlpipelines.execution.step import (
    Resumption,
    StepDetachedError,
    StepResult,
    StepRunner,
)
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from tests.helpers import make_graph, make_step
from tests.integration.kubernetes.steps import IMAGE, Look, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from airflow_mlpipelines.definition.graph import PipelineGraph

MAKE = """
import os, uuid
word = uuid.uuid4().hex
print("the word is", word, flush=True)
if os.environ.get("RANK", "0") == "0":
    open(os.environ["MLP_OUTPUT_MODEL"], "w").write(word)
"""
COMPUTE = "cluster"


@dataclass
class TriedStep:
    """A step whose program makes a word up; so whoever ran it is known by its output.

    Attributes:
        retries: Airflow's.
        lines: What the program and the workers have said, all tries together.
    """

    folder: Path
    kubeconfig: Path
    namespace: str
    retries: int = 1
    nodes: int = 1
    script: str = MAKE
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    lines: list[str] = field(default_factory=list)
    compute: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.handle = FileHandle(self.folder / "handle.json")
        self.index = MetadataIndex(f"sqlite:///{self.folder}/metadata.db")
        self.look = Look(self.kubeconfig, self.namespace, self.identity(1).step_run_id)

    def identity(self, try_number: int) -> TaskIdentity:
        return TaskIdentity("dag", self.run_id, "train", -1, self.retries, try_number)

    def carry_out(
        self, try_number: int, *, resumption: Resumption | None = None, detach: bool = False
    ) -> StepResult:
        """Carry the step out in this process, on a disk that only this try has."""
        with self.on_worker(try_number):
            return self.runner(try_number, detach=detach).run(resumption)

    def on_worker(self, try_number: int) -> AbstractContextManager[None]:
        """Work on the disk that only this try has."""
        return _at_home(self.folder / f"worker-{try_number}")

    def detach(self, try_number: int) -> dict[str, Any]:
        """Return what a trigger is to wait for, once this try's worker has left the step to itself."""
        try:
            self.carry_out(try_number, detach=True)
        except StepDetachedError as error:
            return error.watch
        raise AssertionError("it was not left to itself")

    def lose_worker(
        self, try_number: int, monkeypatch: Any, *, resumption: Resumption | None = None
    ) -> None:
        """Carry the step out in a process that is killed while it commits the outputs."""
        marker = self.folder / f"commits-{try_number}"
        worker = os.fork()
        if worker == 0:
            try:
                monkeypatch.setattr(program, "commit_outputs", lambda *_, **__: _hang(marker))
                self.carry_out(try_number, resumption=resumption)
            finally:
                os._exit(1)
        try:
            wait_until(marker.exists, "the worker commits", seconds=150)
        finally:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)

    def made(self, result: StepResult) -> str:
        """Return the word that is committed."""
        _, path = self._stores.locate(result.outputs["model"].uri)
        return self._stores.default.read_bytes(path).decode()

    def words(self) -> set[str]:
        """Return the words that the workers of this process have told."""
        return _find_words(self.lines)

    def logged_words(self) -> set[str]:
        """Return the words that the pods which are there, and were not told to go, have made up."""
        api = self.look.api
        lines: list[str] = []
        for pod in self.look.pods():
            if pod.metadata.deletion_timestamp is None:
                name = pod.metadata.name
                log = api.read_namespaced_pod_log(
                    name, self.namespace, container="step", _preload_content=False
                )
                lines += log.data.decode().splitlines()
        return _find_words(lines)

    @property
    def _stores(self) -> StoreSet:
        store = open_store("store", (self.folder / "data").as_uri())
        return StoreSet([store], default="store")

    def graph(self) -> PipelineGraph:
        """Return the pipeline that consists of this step."""
        gang = DistributedSpec(framework="pytorch", nodes=self.nodes) if self.nodes > 1 else None
        step = make_step(
            "train",
            command=tuple((LiteralPart(text=part),) for part in ("python3", "-c", self.script)),
            outputs=(OutputSpec(name="model", datastore="store"),),
            compute=COMPUTE,
            distributed=gang,
        )
        fields = {"namespace": self.namespace, "image": IMAGE, "in_cluster": False, **self.compute}
        compute = KubernetesComputeSpec(name=COMPUTE, defer_after_seconds=1, **fields)
        return make_graph(
            step,
            computes={COMPUTE: compute},
            datastores={"store": DatastoreSpec(name="store", url=(self.folder / "data").as_uri())},
        )

    def runner(self, try_number: int, *, detach: bool = False) -> StepRunner:
        graph = self.graph()
        launcher = KubernetesLauncher(graph.computes[COMPUTE])
        decision = StepDecision(Decision.RUN, "never ran before", miss=MissReason.NEVER_RUN)
        digest = launcher.resolve_environment(None).digest
        return StepRunner(
            graph.steps[0],
            graph,
            identity=self.identity(try_number),
            plan=RunPlan({"train": decision}, environments={"train": digest}),
            inputs={},
            services=Services(
                index=self.index,
                stores=self._stores,
                launcher=launcher,
                handle=self.handle,
                emit=self.lines.append,
                blobs=BlobCache(self.folder / "blobs"),
                secrets={"PASSWORD": "canary"},
                may_detach=detach,
            ),
        )


def _find_words(lines: list[str]) -> set[str]:
    return {line.rpartition("the word is ")[2] for line in lines if "the word is" in line}


def _hang(marker: Path) -> None:
    marker.touch()
    time.sleep(600)


@contextmanager
def _at_home(home: Path) -> Iterator[None]:
    before = os.environ.get("AIRFLOW_HOME")
    os.environ["AIRFLOW_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["AIRFLOW_HOME"]
        else:
            os.environ["AIRFLOW_HOME"] = before
