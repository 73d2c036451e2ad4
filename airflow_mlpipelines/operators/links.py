"""The link from a step's task to the page of what it ran."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

from airflow_mlpipelines.operators.steps import CommandOperator, PythonScriptOperator

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

URL_PREFIX = "/mlpipelines"
"""Where the api-server serves our pages, below its own address."""


class StepRunLink(BaseOperatorLink):
    """The button "What it ran" of every step, also of one that was reused without being started.

    The plugin registers it, so the api-server makes the link whenever somebody looks at the task: no
    task pushes anything for it. Airflow finds the operators by their names; an operator of somebody's
    own puts this into its ``operator_extra_links``, and then each of its tasks pushes the link.
    """

    operators = [PythonScriptOperator, CommandOperator]  # noqa: RUF012 - Airflow's own declaration
    name = "What it ran"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the page's address, relative to the api-server's."""
        del operator
        return step_run_path(ti_key.dag_id, ti_key.run_id, ti_key.task_id, ti_key.map_index)


def step_run_path(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
    """Return the address of a task instance's page, relative to the api-server's.

    Example:
        >>> step_run_path("churn", "manual__2026-01-01T00:00:00+00:00", "nightly.train")
        'mlpipelines/step-runs/churn/manual__2026-01-01T00%3A00%3A00%2B00%3A00/nightly.train'
    """
    ids = "/".join(quote(part, safe="") for part in (dag_id, run_id, task_id))
    query = f"?map_index={map_index}" if map_index >= 0 else ""
    return f"{URL_PREFIX.removeprefix('/')}/step-runs/{ids}{query}"
