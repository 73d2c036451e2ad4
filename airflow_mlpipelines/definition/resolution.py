"""What a pipeline's steps name of their workspace: computes, environments and datastores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.definition.computes import ComputeTarget
from airflow_mlpipelines.definition.environment import Environment
from airflow_mlpipelines.definition.graph import LocalComputeSpec
from airflow_mlpipelines.definition.workspace import Datastore

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import (
        ComputeSpec,
        DatastoreSpec,
        EnvironmentSpec,
        RegistrySpec,
    )
    from airflow_mlpipelines.definition.steps import PipelineStep
    from airflow_mlpipelines.definition.workspace import Workspace


class Report(Protocol):
    """Takes note of a problem."""

    def __call__(
        self, message: str, step: PipelineStep | None = None, port: str | None = None
    ) -> None:
        """Note what is wrong with a step's port, a step or the pipeline."""


def with_registry(spec: ComputeSpec, registry: RegistrySpec | None) -> ComputeSpec:
    """Return a compute with its workspace's registry, where it has images and none of its own."""
    if registry is None or isinstance(spec, LocalComputeSpec) or spec.registry is not None:
        return spec
    return spec.model_copy(update={"registry": registry})


class WorkspaceResources:
    """Finds what steps name, and keeps what was found.

    A name that is not there is reported; where something has to stand in its place, it is the workspace's default.

    Attributes:
        datastores: Those that were named, by name.
        computes: Those too, each with the registry that its images go to.
    """

    def __init__(self, workspace: Workspace, report: Report) -> None:
        self._workspace = workspace
        self._report = report
        self.datastores: dict[str, DatastoreSpec] = {}
        self.computes: dict[str, ComputeSpec] = {}

    def find_datastore(self, datastore: Any, step: PipelineStep | None, port: str | None) -> str:
        """Return the name of a datastore; the workspace's default for None."""
        workspace = self._workspace
        if datastore is None:
            spec = workspace.default_datastore.spec
        elif isinstance(datastore, str):
            if datastore not in workspace.datastores:
                self._report(
                    f"datastore {datastore!r} is not in workspace {workspace.name!r}, which has "
                    f"{list_options(workspace.datastores)}.{suggest(datastore, workspace.datastores)}",
                    step,
                    port,
                )
                return self.find_datastore(None, step, port)
            spec = workspace.datastores[datastore].spec
        elif isinstance(datastore, Datastore):
            spec = datastore.spec
        else:
            self._report(f"{datastore!r} is no datastore", step, port)
            return self.find_datastore(None, step, port)
        if self.datastores.setdefault(spec.name, spec) != spec:
            self._report(f"datastore {spec.name!r} is defined in two ways", step, port)
        return spec.name

    def find_compute(self, step: PipelineStep) -> str:
        """Return the name of the compute that the step runs on."""
        targets = self._workspace.compute_targets
        wanted: Any = step.compute_target
        if isinstance(wanted, tuple):
            wanted = wanted[0]
        if wanted is None:
            wanted = self._workspace.default_compute
        if isinstance(wanted, str):
            if wanted not in targets:
                self._report(
                    f"compute {wanted!r} is not in workspace {self._workspace.name!r}, which has "
                    f"{list_options(targets)}.{suggest(wanted, targets)}",
                    step,
                )
                wanted = self._workspace.default_compute
            else:
                wanted = targets[wanted]
        if not isinstance(wanted, ComputeTarget):
            self._report(
                f"compute_target is a {type(wanted).__name__}; pass a compute or its name", step
            )
            wanted = self._workspace.default_compute
        spec = with_registry(wanted.spec, self._workspace.registry)
        known = self.computes.setdefault(wanted.name, spec)
        if known != spec:
            self._report(
                f"compute {wanted.name!r} is defined in two ways; give one another name", step
            )
        return str(wanted.name)

    def find_environment(self, step: PipelineStep) -> EnvironmentSpec | None:
        """Return the environment that the step names; None where it names none."""
        environments = self._workspace.environments
        wanted: Any = step.environment
        if isinstance(wanted, str):
            if wanted not in environments:
                self._report(
                    f"environment {wanted!r} is not in workspace {self._workspace.name!r}, which "
                    f"has {list_options(environments)}.{suggest(wanted, environments)}",
                    step,
                )
                return None
            wanted = environments[wanted]
        if wanted is None:
            return None
        if not isinstance(wanted, Environment):
            self._report(
                f"environment is a {type(wanted).__name__}; pass an Environment or a name", step
            )
            return None
        return wanted.spec
