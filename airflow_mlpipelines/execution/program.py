"""The program of a step run: its environment prepared, its directories filled, launched, its outputs committed."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines import settings
from airflow_mlpipelines.caching.decision import MissReason
from airflow_mlpipelines.caching.launches import Launches
from airflow_mlpipelines.compute.base import (
    DetachedError,
    RelaunchError,
    ResolvedEnvironment,
    StepLaunch,
)
from airflow_mlpipelines.compute.sites import LAUNCH, find_site
from airflow_mlpipelines.definition.graph import ParameterRef
from airflow_mlpipelines.exceptions import (
    ComputeUnavailableError,
    DataError,
    EnvironmentBuildError,
    StepFailedError,
    StoreError,
)
from airflow_mlpipelines.execution.carrying import leave_to_compute
from airflow_mlpipelines.execution.finished import FinishedProgram, remove_old
from airflow_mlpipelines.execution.staging import (
    FetchedData,
    commit_outputs,
    fill_stage,
    keep_run_files,
    link_data,
    locate_workplace,
)
from airflow_mlpipelines.runtime.contract import render_arguments, step_environment
from airflow_mlpipelines.runtime.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.definition.graph import ComputeSpec, PipelineGraph, StepSpec
    from airflow_mlpipelines.execution.identity import TaskIdentity
    from airflow_mlpipelines.execution.services import Services
    from airflow_mlpipelines.execution.staging import Workplace
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.stores import Store


log = logging.getLogger(__name__)


class StepProgram:
    """Runs the program of one step run. One instance serves one try."""

    def __init__(
        self,
        step: StepSpec,
        graph: PipelineGraph,
        *,
        identity: TaskIdentity,
        plan: RunPlan,
        inputs: Mapping[str, Artifact | None],
        services: Services,
        news: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare; nothing is touched yet.

        Args:
            step: The step.
            graph: The pipeline that it belongs to.
            identity: The task instance that this is.
            plan: What the run's first task found.
            inputs: What each input holds in this run; None for external data that is not there.
            services: What the step needs of the world.
            news: What was found out meanwhile about a program that went on without a worker.
        """
        self._step = step
        self._graph = graph
        self._identity = identity
        self._plan = plan
        self._inputs = inputs
        self._services = services
        self._fingerprint: str | None = None
        self._news = news

    def run(
        self, held: ExitStack, *, fingerprint: str | None = None
    ) -> tuple[dict[str, Artifact], dict[str, Any]]:
        """Run the program; return what it made, committed, and the metrics that it logged.

        Args:
            held: Keeps what the step uses of this machine's blobs until it is closed.
            fingerprint: The step's, by which a later try knows this program again; None where nothing may be
                remembered.

        Raises:
            DetachedError: The program goes on without this worker.
            StepFailedError: The program failed.
            ComputeUnavailableError: Its compute was away, or took it down.
            EnvironmentBuildError: Its environment can't be had.
            DataError: An input can't be had, or an output was not made.
        """
        step, services, identity = self._step, self._services, self._identity
        self._fingerprint = fingerprint
        workplace = locate_workplace(
            step,
            services.stores,
            step_run_id=identity.step_run_id,
            directory=identity.directory(self._graph.name, step.id),
        )
        remove_old(settings.work_directory())
        if fingerprint is not None:
            noted = FinishedProgram.find(workplace.stage.root, fingerprint)
            if noted is not None:
                services.emit("The program has ended well in an earlier try: what it made is sent")
                return self._commit(workplace, noted)
        services.launcher.check_resources(step.name, step.resources, nodes=self._nodes)
        adopt = services.launcher.recover(identity.step_run_id, services.handle)
        while True:
            try:
                return self._commit(*self._run_once(workplace, held, adopt=adopt))
            except RelaunchError as error:
                services.emit(str(error))
                time.sleep(error.pause)
            adopt, self._news = False, None

    @property
    def _compute(self) -> ComputeSpec:
        return self._graph.computes[self._step.compute]

    @property
    def _nodes(self) -> int:
        return self._step.distributed.nodes if self._step.distributed is not None else 1

    def _run_once(
        self, workplace: Workplace, held: ExitStack, *, adopt: bool
    ) -> tuple[Workplace, FinishedProgram]:
        """Run the program to its end; return where it has worked, with the note of its end."""
        step, services = self._step, self._services
        # What runs already, and is not on this machine, needs nothing of what could be away by now.
        is_elsewhere = adopt and services.launcher.carries_files
        environment = ResolvedEnvironment(description={})
        if not is_elsewhere:
            environment = services.launcher.prepare_environment(
                step.environment, self._resolve_environment(), emit=services.emit
            )
        snapshot = self._plan.snapshots.get(step.id)
        workplace = leave_to_compute(
            workplace,
            step,
            services.stores,
            snapshot=snapshot,
            inputs=self._inputs,
            can_carry=services.launcher.can_carry if self._nodes == 1 else _carries_nothing,
        )
        # Docker mounts inputs read-only; a process on the worker has the rights of their owner.
        link = self._compute.type == "docker"
        try:
            workplace = fill_stage(
                workplace,
                step,
                services.stores,
                snapshot=snapshot,
                inputs=self._inputs,
                fetched=None if is_elsewhere else FetchedData(services.blobs, held, link=link),
                adopt=adopt,
            )
        except BaseException:
            if is_elsewhere or not adopt:  # else the program works in these very directories
                workplace.remove()
            raise
        try:
            metrics = self._launch(workplace, environment, adopt=adopt)
        except BaseException as error:
            if services.launcher.carries_files or self._is_over(error):
                workplace.remove()
            raise
        finished = FinishedProgram(
            workplace.stage.root,
            self._fingerprint or "",
            metrics,
            committed=dict(workplace.carriage.committed),
        )
        finished.write()
        return workplace, finished

    def _is_over(self, error: BaseException) -> bool:
        """Return whether nothing of the program runs on, in the directories that a next try adopts with it."""
        if isinstance(error, StepFailedError | DataError | RelaunchError):
            return True
        if not isinstance(error, ComputeUnavailableError):
            return False
        try:
            return self._services.handle.get() is None
        except Exception:  # noqa: BLE001 - why the compute is away matters more
            return False

    def _commit(
        self, workplace: Workplace, finished: FinishedProgram
    ) -> tuple[dict[str, Artifact], dict[str, Any]]:
        """Return what the program has made, once it is where it stays, and the metrics that it logged.

        Where a store is away, all of it stays on this machine for the next try, if there is one.
        """
        services, identity = self._services, self._identity
        try:
            keep_run_files(workplace, services.stores)
            outputs = commit_outputs(
                workplace,
                self._step,
                services.stores,
                identity=identity,
                cache=services.cache,
                blobs=services.blobs,
                note=finished,
            )
        except StoreError:
            if self._fingerprint is None or not identity.has_tries_left:
                workplace.remove()
            else:
                services.emit(
                    "What the program has made stays on this worker, for the next try to send"
                )
            raise
        except DataError:
            workplace.remove()
            # The next try is to run it anew, not to find the same again.
            release(services, identity, self._compute)
            raise
        workplace.remove()
        return outputs, finished.metrics

    def _resolve_environment(self) -> ResolvedEnvironment:
        """Return the environment that the plan names, where that can be had: no registry is asked again."""
        step, services = self._step, self._services
        planned = self._plan.environments[step.id]
        recalled = None
        is_known = self._plan.steps[step.id].miss is not MissReason.NOT_CACHEABLE
        if is_known and self._graph.computes[step.compute].type != "local":
            description = services.index.get_contents([planned]).get(planned)
            if description is not None:
                recalled = services.launcher.recall_environment(step.environment, description)
        if recalled is None:
            return services.launcher.resolve_environment(step.environment)
        if recalled.digest != planned:
            raise EnvironmentBuildError(
                f"step {step.name!r}: local files that its environment is built from have changed since this run "
                "was planned. Clear the run's first task, and what comes after it, to plan anew."
            )
        return recalled

    def _launch(
        self, workplace: Workplace, environment: ResolvedEnvironment, *, adopt: bool
    ) -> dict[str, Any]:
        """Run the program to its end and return the metrics that it logged."""
        step, services, identity = self._step, self._services, self._identity
        paths = services.launcher.process_paths(workplace.stage, environment)
        parameters = self._plan.parameters
        params = {
            name: parameters[value.name] if isinstance(value, ParameterRef) else value
            for name, value in step.params.items()
        }
        inputs = {
            item.name: paths.inputs.get(item.name, f"{paths.run}/absent/{item.name}")
            for item in step.inputs
        }
        for item in step.inputs:
            artifact = self._inputs[item.name]
            if item.mode == "direct" and artifact is not None:
                inputs[item.name] = artifact.uri
        if not adopt:
            link_data(workplace, step, paths)
        argv = render_arguments(
            (*step.command, *step.arguments),
            inputs=inputs,
            outputs=paths.outputs,
            parameters=parameters,
        )
        if step.script is not None:
            argv = [paths.python, step.script, *argv]
        if step.distributed is not None:
            gang = step.distributed.model_dump_json()
            argv = [paths.python, "-m", "airflow_mlpipelines.runtime.gang", gang, "--", *argv]
        variables = step_environment(
            run_id=identity.step_run_id,
            step=step.name,
            pipeline=self._graph.name,
            run_directory=paths.run,
            runtime=paths.runtime,
            inputs=inputs,
            outputs=paths.outputs,
            params=params,
        )
        # Noted before anything is there: what is lost with this worker is found all the same.
        site = find_site(self._compute)
        labels = identity.labels
        if site is not None:
            labels[LAUNCH] = Launches(services.index).note(
                identity.step_run_id,
                task=identity.task,
                attempt=identity.attempt,
                nodes=self._nodes,
                site=site,
            )
        spec = step.environment
        own = {**(spec.environment_variables if spec else {}), **step.environment_variables}
        launch = StepLaunch(
            step_run_id=identity.step_run_id,
            step_name=step.name,
            argv=tuple(argv),
            env={**variables, **own},
            secrets=services.secrets,
            stage=workplace.stage,
            resources=step.resources,
            image=environment.image,
            nodes=self._nodes,
            timeout_seconds=step.timeout_seconds,
            labels=labels,
            carriage=workplace.carriage,
            detach=services.may_detach,
            news=self._news,
        )
        self._see_through(launch, workplace)
        return read_metrics(workplace.stage.run)

    def _see_through(self, launch: StepLaunch, workplace: Workplace) -> None:
        """Run the program to its end; where it fails, what is of interest for why is kept."""
        services = self._services
        try:
            services.launcher.run(launch, emit=services.emit, handle=services.handle)
        except (DetachedError, ComputeUnavailableError):
            raise  # it may be alive, and writing to what would be taken away
        except StoreError:
            if self._identity.has_tries_left:
                services.emit(
                    "What the program has made stays on its compute, for the next try to send"
                )
            raise
        except BaseException:
            try:
                keep_run_files(workplace, services.stores)
            except (DataError, OSError) as error:  # why the program failed matters more
                services.emit(f"Its ./outputs and ./logs can't be kept: {error}")
            raise


def release(services: Services, identity: TaskIdentity, compute: ComputeSpec) -> None:
    """Leave nothing of a step run on its compute: nobody is to go on with it.

    What can't be removed now is removed by :mod:`airflow_mlpipelines.execution.janitor`.
    """
    if find_site(compute) is None:
        return
    step_run_id, launches = identity.step_run_id, Launches(services.index)
    try:
        if launches.has(step_run_id) and services.launcher.release(step_run_id, services.handle):
            launches.forget(step_run_id)
    except Exception as error:  # noqa: BLE001 - how the step ended is decided
        log.warning("What the compute still has of the step can't be removed: %s", error)


def _carries_nothing(_store: Store) -> bool:
    """Several nodes share what the worker brings and fetches; none of them commits outputs by itself."""
    return False
