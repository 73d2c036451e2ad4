"""The plugin that Airflow loads in all of its processes. It must stay light."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from airflow_mlpipelines import preload


class MLPipelinesPlugin(AirflowPlugin):
    """The page of what a step ran, and the link to it.

    Only the api-server, and ``airflow plugins``, look at these attributes: they are made when looked
    at, so that no other process imports FastAPI or our operators because of them.
    """

    name = "mlpipelines"
    listeners = [preload]  # noqa: RUF012 - as Airflow declares it

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The app that serves our pages."""
        from airflow_mlpipelines.operators.links import URL_PREFIX
        from airflow_mlpipelines.server.app import create_app

        return [{"app": create_app(), "url_prefix": URL_PREFIX, "name": "ML pipelines"}]

    @cached_property
    def operator_extra_links(self) -> list[Any]:  # type: ignore[override]
        """The button "What it ran" on the page of each step."""
        from airflow_mlpipelines.operators.links import StepRunLink

        return [StepRunLink()]
