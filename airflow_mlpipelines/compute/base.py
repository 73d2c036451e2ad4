"""How a step is launched, whatever it runs on: what a launcher is given, and what it promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from airflow_mlpipelines._digest import digest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from airflow_mlpipelines.compute.built_images import ImageDefinition
    from airflow_mlpipelines.definition.graph import EnvironmentSpec, ResourcesSpec
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.stores import Store

Emit = Callable[[str], None]
"""Takes one line that the step printed, without its line end, as soon as it is there."""
KEPT_DIRECTORIES = ("outputs", "logs")
"""Folders of the working directory that are kept with the run, as in Azure ML."""


@dataclass(frozen=True)
class Stage:
    """The directories of one step run on the worker's machine.

    Attributes:
        root: Holds all that is made for this step run and thrown away after it.
        code: The unpacked snapshot; the process's working directory. Writable.
        runtime: A directory for ``PYTHONPATH`` with the runtime package in it.
        run: Where process and worker exchange files (``metrics.jsonl`` and the like). Writable.
        inputs: Each input's name and the file or directory with its data. Not to be written.
        outputs: Each output's name and the path where the process shall make it. Not there yet, but for directories
            whose files are to be uploaded.
        outputs_root: The directory that all the outputs' paths lie in. Writable.
        carried: Inputs that are not on this machine, as the compute fetches them by itself: each one's name,
            and its path below the directory in which the process finds its inputs.
    """

    root: Path
    code: Path
    runtime: Path
    run: Path
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    outputs_root: Path
    carried: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProcessPaths:
    """The same places as in :class:`Stage`, as the step's process sees them.

    Attributes:
        python: argv[0] for a Python script: a path, or a name that is on the process's ``PATH``.
    """

    code: str
    runtime: str
    run: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    python: str


@dataclass(frozen=True)
class ResolvedEnvironment:
    """What an environment comes down to on a compute: all of it that can change a result.

    Attributes:
        description: JSON: ``{"kind": "python", "python": "3.11.7", "packages": {name: version},
            "variables": {name: digest}}`` or ``{"kind": "image", "image": "<name for people>", "digest":
            "sha256:…", "variables": {name: digest}}``.
        image: The reference to run, by digest; None for processes.
        python: The interpreter, where it is known beforehand.
        cacheable: False if its content can't be known, so that nothing may be reused.
        problem: Why it is not cacheable, in words.
    """

    description: Mapping[str, Any]
    image: str | None = None
    python: str | None = None
    cacheable: bool = True
    problem: str | None = None

    @cached_property
    def digest(self) -> str:
        """64 hex digits. An image's name does not count, its digest does."""
        counted = {key: value for key, value in self.description.items() if key != "image"}
        return digest("environment-v1", counted)


def name_environment(environment: EnvironmentSpec) -> str:
    """Return how messages call an environment."""
    return f"environment {environment.name!r}" if environment.name else "the step's environment"


def digest_variables(environment: EnvironmentSpec | None) -> dict[str, str]:
    """Return the environment's variables with the digests of their values: people put passwords there."""
    values = environment.environment_variables if environment is not None else {}
    return {name: digest("variable-v1", value) for name, value in values.items()}


@dataclass(frozen=True)
class CarriedOutput:
    """Where the compute commits an output to.

    Attributes:
        is_directory: What it was declared as; None takes either.
    """

    store: Store
    path: str
    is_directory: bool | None


@dataclass(frozen=True)
class Carriage:
    """Data that the compute carries between datastores and the step by itself, past the worker.

    Attributes:
        snapshot: The datastore and the digest of the step's code; None if the stage has the code.
        inputs: What is fetched, and from where.
        links: Where links to inputs shall be in the code: each input's name, and ``path_on_compute``. Only with
            ``snapshot``; else the stage has them.
        outputs: What is committed, and where to.
        kept: The datastore and the directory for ``./outputs`` and ``./logs``; None if the worker keeps them.
        committed: What the compute has committed: the launcher notes it here before its ``run`` returns.
    """

    snapshot: tuple[Store, str] | None = None
    inputs: Mapping[str, tuple[Store, Artifact]] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, CarriedOutput] = field(default_factory=dict)
    kept: tuple[Store, str] | None = None
    committed: dict[str, Artifact] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to carry."""
        return bool(self.snapshot or self.inputs or self.outputs or self.kept)


@dataclass(frozen=True)
class StepLaunch:
    """All that a launcher needs to know of one step run.

    Attributes:
        step_run_id: Safe in file names, container names and label values. The same for every try
            of one Airflow task instance, another one after somebody cleared it.
        env: Environment variables that anybody may see.
        secrets: Environment variables that must appear in no log, label, argument or rendered field.
        image: The image's reference, for launchers of containers.
        nodes: On how many machines of the compute it runs, each with ``resources`` of its own. ``argv`` is the
            same on all, and makes them find each other (:mod:`airflow_mlpipelines.runtime.gang`).
        labels: ``dag_id``, ``run_id``, ``task_id``, ``map_index``, ``try_number``, as text.
        timeout_seconds: The program is killed after this long.
        carriage: What the compute carries by itself; only what its launcher said it can.
        detach: Whether the launcher may leave a long program to itself, with :class:`DetachedError`.
        news: What was found out about a program that was left to itself, as the launcher's trigger told
            it; None in a try's first worker.
    """

    step_run_id: str
    step_name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    secrets: Mapping[str, str]
    stage: Stage
    resources: ResourcesSpec
    image: str | None = None
    nodes: int = 1
    timeout_seconds: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    carriage: Carriage = field(default_factory=Carriage)
    detach: bool = False
    news: Mapping[str, Any] | None = None


class DetachedError(Exception):
    """The program goes on without this worker: not a failure, but the way out of :meth:`Launcher.run`.

    Attributes:
        watch: What a trigger needs to wait for it: JSON, without secrets.
    """

    def __init__(self, watch: dict[str, Any]) -> None:
        self.watch = watch
        super().__init__("the program goes on without this worker")


class RelaunchError(Exception):
    """The compute took the program away, and it is to be launched again, with directories made anew.

    Attributes:
        pause: Seconds to wait before that.
    """

    def __init__(self, message: str, *, pause: float) -> None:
        self.pause = pause
        super().__init__(message)


class HandleStore(Protocol):
    """Remembers, beyond the worker's life, what was launched (Airflow's task state store)."""

    def get(self) -> dict[str, Any] | None:
        """Return what an earlier try of this same task instance launched, or None."""

    def set(self, handle: dict[str, Any] | None) -> None:
        """Remember what was launched: a small JSON object without secrets. None forgets it."""


class BuildGuard(Protocol):
    """Lets one at a time build the same, of all who share the metadata database."""

    def __call__(self, key: str, name: str, *, emit: Emit) -> AbstractContextManager[Any]:
        """Hold the right to build until the end of the block, after waiting for whoever holds it.

        Args:
            key: 64 hex digits: what is built, and for which place.
            name: What it is, for the line that tells of waiting.
            emit: Takes that line.
        """


class Launcher(ABC):
    """Runs step programs on one compute. One instance serves one step run.

    Attributes:
        carries_files: Whether a program has its files with it, so that going on with one that was found
            again takes neither code nor inputs on this machine.
        build_guard: Keeps other machines from building what this one is building; None where nobody
            shares what is built.
    """

    carries_files = False
    build_guard: BuildGuard | None = None

    def check_resources(self, step: str, resources: ResourcesSpec, *, nodes: int = 1) -> None:
        """Return, unless it can be known now that a step will never get its ``resources`` here, on each node.

        Called before anything is built, pulled or staged for it. What is in use at the moment does not
        count. This default knows of nothing.

        Raises:
            StepFailedError: The compute can't give them, whoever tries.
            ComputeUnavailableError: This worker can't, or the compute does not answer.
        """
        del step, resources, nodes

    @abstractmethod
    def resolve_environment(self, environment: EnvironmentSpec | None) -> ResolvedEnvironment:
        """Return what ``environment`` comes down to here, building nothing that takes long.

        Called when a run is planned, once per environment, in the planning process.

        Raises:
            EnvironmentBuildError: It can't be resolved; the message says why and what to do.
        """

    @abstractmethod
    def prepare_environment(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment, *, emit: Emit
    ) -> ResolvedEnvironment:
        """Return ``resolved`` made ready to run: built, pulled, its ``python`` and ``image`` set.

        Raises:
            EnvironmentBuildError: It can't be built.
        """

    def recall_environment(
        self, environment: EnvironmentSpec | None, description: Mapping[str, Any]
    ) -> ResolvedEnvironment | None:
        """Return the environment that a run was planned with, whatever its definition means by now.

        Asked for by every step of the run, so that tags are looked up once.

        Args:
            environment: The definition.
            description: What :meth:`resolve_environment` said of it when the run was planned.

        Returns:
            What to prepare instead; None if this compute can only have what there is now.
        """
        del environment, description
        return None

    def is_prepared(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment
    ) -> bool | None:
        """Return whether :meth:`prepare_environment` would find all there; None if it can't be known.

        For people who look; nothing is built or fetched.
        """
        del environment, resolved
        return None

    def can_carry(self, store: Store) -> bool:
        """Return whether the compute itself moves data between ``store`` and a step, past the worker.

        By default it can't: the worker fetches inputs, and commits outputs.
        """
        del store
        return False

    def define_image(self, environment: EnvironmentSpec) -> ImageDefinition | None:
        """Return the image that is built for an environment here; None where no image is.

        Raises:
            EnvironmentBuildError: It has no base, or can't be built anywhere.
        """
        del environment
        return None

    @abstractmethod
    def process_paths(self, stage: Stage, environment: ResolvedEnvironment) -> ProcessPaths:
        """Return where the step's process finds the places of ``stage``."""

    def recover(self, step_run_id: str, handle: HandleStore) -> bool:
        """Return whether the program of an earlier try is still there for :meth:`run` to adopt.

        Called before anything is staged. If it returns False, nothing of an earlier try is running
        any more, and its directories may be taken down. This default adopts nothing and knows of
        nothing to remove.
        """
        del step_run_id, handle
        return False

    @abstractmethod
    def run(self, launch: StepLaunch, *, emit: Emit, handle: HandleStore) -> None:
        """Run the program to its end; return only if it ended with exit code 0.

        When this returns or raises, but for the first two errors, nothing that the program started is
        running any more. A program that an earlier try launched, and that survived its worker, is adopted
        or removed first. What the program has made may be kept on the compute until :meth:`release`, so that
        another worker finds it if this one is lost before all of it is committed.

        Raises:
            DetachedError: It goes on without this worker, as ``launch`` allows.
            ComputeUnavailableError: The compute does not answer.
            RelaunchError: The compute took it away. Call this again, with new directories.
            StepFailedError: It ended otherwise; with its exit code and the end of its log.
        """

    def release(self, step_run_id: str, handle: HandleStore) -> bool:
        """Remove what the compute still has of a step run; return whether nothing of it is left.

        Called once all that the program made is committed and remembered, or when the last try has failed:
        nobody will adopt anything any more. Never fails; where the compute does not answer, something is left.
        This default knows of nothing to remove.
        """
        del step_run_id, handle
        return True

    @abstractmethod
    def kill(self) -> None:
        """End the running program and all it started, within three seconds. Safe to call always."""
