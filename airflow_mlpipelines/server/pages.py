"""Facts as HTML: server-rendered, without scripts, everything escaped."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow_mlpipelines._units import show_duration, show_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    import jinja2


def render_step_run(facts: Mapping[str, Any]) -> str:
    """Return the page of a step run.

    Args:
        facts: What :func:`~airflow_mlpipelines.server.facts.describe_step_run` returned.
    """
    return _templates().get_template("step_run.html").render(facts=facts)


def render_message(message: str) -> str:
    """Return a page that says one thing."""
    return _templates().get_template("message.html").render(message=message)


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("airflow_mlpipelines.server"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "duration": show_duration,
        "size": show_size,
        "value": show_value,
        "task_url": task_url,
        "page_url": page_url,
    }
    return templates


def show_value(value: Any) -> str:
    """Return a value for people: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def task_url(facts: Mapping[str, Any]) -> str:
    """Return the address of a task instance in Airflow's UI, relative to our pages.

    Airflow's pages know their runs only where ``:`` and ``+`` stand as they are.
    """
    dag_id, run_id, task_id = (
        quote(facts[name], safe=":+") for name in ("dag_id", "run_id", "task_id")
    )
    mapped = f"/mapped/{facts['map_index']}" if facts["map_index"] >= 0 else ""
    return f"../../../../dags/{dag_id}/runs/{run_id}/tasks/{task_id}{mapped}"


def page_url(place: Mapping[str, Any]) -> str:
    """Return the address of the page of another run of the same DAG, relative to ours."""
    run_id, task_id = quote(place["run_id"], safe=""), quote(place["task_id"], safe="")
    query = f"?map_index={place['map_index']}" if place["map_index"] >= 0 else ""
    return f"../{run_id}/{task_id}{query}"
