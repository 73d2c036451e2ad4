"""The FastAPI app that Airflow's api-server mounts. Imported there and nowhere else.

Airflow protects none of an app that it mounts: every route here says itself who may see it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.exceptions import MLPipelinesError
from airflow_mlpipelines.operators.connections import metadata_url
from airflow_mlpipelines.server.facts import describe_step_run
from airflow_mlpipelines.server.pages import render_message, render_step_run

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_NOT_FOUND, _UNAVAILABLE = 404, 503

may_see_task_instance = requires_access_dag("GET", DagAccessEntity.TASK_INSTANCE)
"""Wants a login, and the right to see task instances of the DAG that the address names."""


def open_index() -> MetadataIndex:
    """Return the metadata index of this Airflow."""
    return MetadataIndex(metadata_url())


def create_app() -> FastAPI:
    """Return the app, with all of its routes."""
    app = FastAPI(title="ML pipelines", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route(
        "/step-runs/{dag_id}/{run_id}/{task_id}",
        show_step_run,
        dependencies=[Depends(may_see_task_instance)],
        response_class=HTMLResponse,
    )
    app.add_exception_handler(MLPipelinesError, _answer_error)
    return app


def show_step_run(
    dag_id: str,
    run_id: str,
    task_id: str,
    index: Annotated[MetadataIndex, Depends(open_index)],
    map_index: int = -1,
    as_format: Annotated[Literal["html", "json"], Query(alias="format")] = "html",
) -> Response:
    """Show what a task instance's newest step run did, for people or as JSON."""
    facts = describe_step_run(index, dag_id, run_id, task_id, map_index=map_index)
    if facts is None:
        message = f"Nothing is known of task {task_id!r} in run {run_id!r} of DAG {dag_id!r} yet."
        return _answer(message, as_json=as_format == "json", status_code=_NOT_FOUND)
    if as_format == "json":
        return JSONResponse(facts, headers=_HEADERS)
    return HTMLResponse(render_step_run(facts), headers=_HEADERS)


def _answer_error(request: Request, error: Exception) -> Response:
    as_json = request.query_params.get("format") == "json"
    return _answer(str(error), as_json=as_json, status_code=_UNAVAILABLE)


def _answer(message: str, *, as_json: bool, status_code: int) -> Response:
    if as_json:
        body: Mapping[str, Any] = {"detail": message}
        return JSONResponse(body, status_code, headers=_HEADERS)
    return HTMLResponse(render_message(message), status_code, headers=_HEADERS)
