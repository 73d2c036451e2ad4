"""Pipelines: steps put together, checked, and handed to the compiler."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import make_identifier
from airflow_mlpipelines.definition.builder import build_graph
from airflow_mlpipelines.definition.workspace import find_calling_file
from airflow_mlpipelines.exceptions import PipelineCheckError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from airflow.sdk import DAG, TaskGroup

    from airflow_mlpipelines.definition.graph import PipelineGraph
    from airflow_mlpipelines.definition.workspace import Datastore, Workspace

_collected: ContextVar[list[Pipeline] | None] = ContextVar("mlpipelines_collected", default=None)


class Pipeline:
    """Steps with the data that passes between them.

    Args:
        workspace: Names the datastores, computes and environments.
        steps: Steps, lists of steps (side by side) and :class:`StepSequence`. Naming the last ones is
            enough: those that make what they read come along.
        description: For people; shown in the Airflow UI.
        default_datastore: Where outputs go that name no datastore; by default the workspace's.
        default_source_directory: The folder of scripts whose step names none; by default that of the
            file that makes the pipeline.
        resolve_closure: False for exactly the steps given.
        name: Its name, and by default the DAG's id; by default the name of the file that makes it.
    """

    def __init__(
        self,
        workspace: Workspace,
        steps: Sequence[Any],
        description: str | None = None,
        default_datastore: Datastore | str | None = None,
        default_source_directory: str | Path | None = None,
        resolve_closure: bool = True,
        *,
        name: str | None = None,
    ) -> None:
        file = find_calling_file()
        self.workspace = workspace
        self.steps = list(steps)
        self.description = description
        self.default_datastore = default_datastore
        self.default_source_directory = default_source_directory
        self.resolve_closure = resolve_closure
        self.root = (file.parent if file is not None else Path.cwd()).resolve()
        self.name = name or make_identifier(file.stem if file is not None else "pipeline")
        self.dag_id = self.name
        collected = _collected.get()
        if collected is not None:
            collected.append(self)

    @cached_property
    def _built(self) -> tuple[PipelineGraph | None, list[Problem]]:
        return build_graph(self)

    @property
    def graph(self) -> PipelineGraph:
        """The checked, serializable form.

        Raises:
            PipelineCheckError: Something is wrong; it has all problems at once.
        """
        graph, problems = self._built
        if graph is None or problems:
            raise PipelineCheckError(self.name, problems)
        return graph

    def validate(self) -> list[Problem]:
        """Return all that is wrong with the pipeline; an empty list if it is fine."""
        return list(self._built[1])

    def to_dag(self, dag_id: str | None = None, **dag_arguments: Any) -> DAG:
        """Return the pipeline as an Airflow DAG.

        Args:
            dag_id: The DAG's id; by default the pipeline's name.
            dag_arguments: ``wait_for_inputs=True`` to let each run wait until its external data is
                there, and Airflow's own arguments of a DAG, such as ``schedule``.

        Raises:
            PipelineCheckError: Something is wrong with the pipeline.
        """
        from airflow_mlpipelines.compiler.render import to_dag

        self.dag_id = dag_id or self.name
        return to_dag(self.graph, dag_id=self.dag_id, **dag_arguments)

    def to_task_group(self, group_id: str | None = None, **arguments: Any) -> TaskGroup:
        """Return the pipeline as a task group of the DAG that is being defined.

        What is chained behind it runs whether the steps ran or were reused.

        Args:
            group_id: The group's id; by default the pipeline's name.
            arguments: ``wait_for_inputs``, and Airflow's own arguments of a TaskGroup.

        Raises:
            PipelineCheckError: Something is wrong with the pipeline.
            DefinitionError: No DAG is being defined.
        """
        from airflow_mlpipelines.compiler.render import to_task_group

        return to_task_group(self.graph, group_id=group_id, **arguments)

    def __repr__(self) -> str:
        return f"Pipeline({self.name!r})"


@contextmanager
def collect_pipelines() -> Iterator[list[Pipeline]]:
    """Collect the pipelines that are made inside the block, in order, into the list given."""
    found: list[Pipeline] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)
