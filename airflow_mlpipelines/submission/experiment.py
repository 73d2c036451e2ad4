"""Experiments: runs of pipelines under one name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.definition.graph import REGENERATE_ALL, REGENERATE_OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.definition.pipeline import Pipeline
    from airflow_mlpipelines.definition.workspace import Workspace
    from airflow_mlpipelines.submission.run import PipelineRun

_AIRFLOW_URL = "AIRFLOW_API_URL"


class Experiment:
    """A name for runs that belong together.

    Args:
        workspace: The workspace.
        name: The experiment's name.
    """

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace = workspace
        self.name = name

    def submit(
        self,
        pipeline: Pipeline,
        pipeline_parameters: Mapping[str, Any] | None = None,
        regenerate_outputs: bool | Sequence[str] = False,
        *,
        airflow_conn_id: str | None = None,
    ) -> PipelineRun:
        """Start a run of a pipeline.

        Without a server, the pipeline runs in this process, with Airflow's own ``dag.test()``, and is
        over when this returns. Where ``$AIRFLOW_API_URL`` or a connection names a server, the run is
        started there, over its REST API, and goes on by itself; the server has to have the pipeline's
        file in its DAG folder.

        Args:
            pipeline: The pipeline.
            pipeline_parameters: Values by name; others have their defaults.
            regenerate_outputs: Whether to run steps whatever is remembered: all, or those named.
            airflow_conn_id: The Airflow connection of a server.

        Raises:
            PipelineCheckError: Something is wrong with the pipeline.
            SubmissionError: The run can't be started.
        """
        conf = make_conf(pipeline_parameters, regenerate_outputs)
        if airflow_conn_id is not None or os.environ.get(_AIRFLOW_URL):
            from airflow_mlpipelines.submission.remote import submit_over_rest
            from airflow_mlpipelines.submission.rest import AirflowClient

            client = (
                AirflowClient.from_connection(airflow_conn_id)
                if airflow_conn_id is not None
                else AirflowClient.from_environment()
            )
            return submit_over_rest(pipeline, conf, client=client, experiment=self.name)
        from airflow_mlpipelines.submission.local import run_in_process

        return run_in_process(pipeline, conf, experiment=self.name)

    def __repr__(self) -> str:
        return f"Experiment({self.name!r})"


def make_conf(
    parameters: Mapping[str, Any] | None, regenerate: bool | Sequence[str]
) -> dict[str, Any]:
    """Return the run configuration for Airflow: parameters, and what to regenerate."""
    conf = dict(parameters or {})
    if regenerate is True:
        conf[REGENERATE_OUTPUTS] = [REGENERATE_ALL]
    elif regenerate:
        conf[REGENERATE_OUTPUTS] = list(regenerate)
    return conf
