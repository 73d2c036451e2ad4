"""Runs on an Airflow server: started and followed over its REST API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compiler.tasks import pool_name
from airflow_mlpipelines.exceptions import SubmissionError
from airflow_mlpipelines.submission.run import PipelineRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.definition.graph import PipelineGraph
    from airflow_mlpipelines.definition.pipeline import Pipeline
    from airflow_mlpipelines.submission.rest import AirflowClient


class RemoteRun:
    """The facts of one run, asked of its server."""

    def __init__(self, client: AirflowClient, dag_id: str, run_id: str) -> None:
        self._client = client
        self.dag_id = dag_id
        self.run_id = run_id

    def get_state(self) -> str:
        """Return Airflow's state of the run."""
        return str(self._client.get_run(self.dag_id, self.run_id)["state"])

    def list_tasks(self) -> list[dict[str, Any]]:
        """Return each task's id, state and duration."""
        return self._client.list_task_instances(self.dag_id, self.run_id)

    def find_xcom(self, task_id: str, key: str) -> Any | None:
        """Return an XCom's value, or None."""
        return self._client.find_xcom(self.dag_id, self.run_id, task_id, key)

    def get_log(self, task_id: str, try_number: int) -> list[str]:
        """Return the lines of a task's log."""
        return self._client.get_log(self.dag_id, self.run_id, task_id, try_number)

    def cancel(self) -> None:
        """End the run."""
        self._client.cancel(self.dag_id, self.run_id)


def submit_over_rest(
    pipeline: Pipeline, conf: Mapping[str, Any], *, client: AirflowClient, experiment: str = ""
) -> PipelineRun:
    """Start a run of a pipeline that a server has as a DAG.

    Raises:
        SubmissionError: The server can't be reached, has no such DAG, refuses a parameter, or has no
            pool for a compute's ``max_nodes``.
        PipelineCheckError: Something is wrong with the pipeline.
    """
    graph = pipeline.graph
    _check_pools(graph, client)
    run_id = client.trigger(pipeline.dag_id, conf)
    return PipelineRun(graph, RemoteRun(client, pipeline.dag_id, run_id), experiment=experiment)


def _check_pools(graph: PipelineGraph, client: AirflowClient) -> None:
    """Refuse what would never start, as Airflow lets a task wait for ever if its pool is not there, or be unlimited."""
    for name in sorted({step.compute for step in graph.steps}):
        compute, pool = graph.computes[name], pool_name(name)
        if compute.max_nodes is None:
            continue
        found = client.find_pool(pool)
        defers = compute.type == "kubernetes" and compute.deferrable
        if found is None:
            problem = "the server has none of that name, and the steps would wait for ever. Make it"
        elif defers and not found.get("include_deferred"):
            problem = (
                "it does not count deferred tasks, and so none of the steps that run on without a worker. "
                "Let it count them"
            )
        else:
            continue
        option = "--include-deferred " if defers else ""
        raise SubmissionError(
            f"pipeline {graph.name!r}: compute {name!r} has max_nodes={compute.max_nodes}, which Airflow keeps with "
            f"the pool {pool!r}; {problem}: airflow pools set {option}{pool} {compute.max_nodes} 'nodes of {name}'"
        )
