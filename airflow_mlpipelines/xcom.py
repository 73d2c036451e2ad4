"""XCom backend: data travels by reference, and a reused step answers as if it had run.

``[core] xcom_backend = airflow_mlpipelines.xcom.DataReferenceXComBackend``
"""

from __future__ import annotations

from typing import Any

from airflow.sdk.bases.xcom import BaseXCom

_PLAN_KEY = "plan"
_PLAN_TASK = "cache_sensor"


class DataReferenceXComBackend(BaseXCom):
    """Airflow's XCom with two things more.

    A pull from a step that was reused is answered from the plan of the run, so that nobody who pulls
    needs to know. Values too large for a database row, or not JSON (DataFrames, arrays, models), go to
    the default datastore by digest and come back as the value.
    """

    @classmethod
    def get_one(
        cls,
        *,
        key: str,
        dag_id: str,
        task_id: str,
        run_id: str,
        map_index: int | None = None,
        include_prior_dates: bool = False,
    ) -> Any | None:
        """Return a value as Airflow does, or, from a reused step, what the plan reuses."""
        value = super().get_one(
            key=key,
            dag_id=dag_id,
            task_id=task_id,
            run_id=run_id,
            map_index=map_index,
            include_prior_dates=include_prior_dates,
        )
        if value is not None:
            return value
        return cls._from_plan(key=key, dag_id=dag_id, task_id=task_id, run_id=run_id)

    @classmethod
    def get_all(
        cls,
        *,
        key: str,
        dag_id: str,
        task_id: str,
        run_id: str,
        include_prior_dates: bool = False,
    ) -> Any:
        """Return all values as Airflow does, or, from a reused step, the one that the plan reuses."""
        values = super().get_all(
            key=key,
            dag_id=dag_id,
            task_id=task_id,
            run_id=run_id,
            include_prior_dates=include_prior_dates,
        )
        if values:
            return values
        value = cls._from_plan(key=key, dag_id=dag_id, task_id=task_id, run_id=run_id)
        return values if value is None else [value]

    @classmethod
    def _from_plan(cls, *, key: str, dag_id: str, task_id: str, run_id: str) -> Any | None:
        """Return what a reused step would have pushed under ``key``, or None."""
        group, _, step_id = task_id.rpartition(".")
        plan_task = f"{group}.{_PLAN_TASK}" if group else _PLAN_TASK
        if step_id == _PLAN_TASK or key == _PLAN_KEY:
            return None
        plan = super().get_one(key=_PLAN_KEY, dag_id=dag_id, task_id=plan_task, run_id=run_id)
        if not isinstance(plan, dict):
            return None
        from airflow_mlpipelines.caching.decision import Decision, RunPlan

        decision = RunPlan.from_dict(plan).steps.get(step_id)
        if decision is None or decision.decision is not Decision.REUSE:
            return None
        outputs = {name: artifact.to_dict() for name, artifact in decision.outputs.items()}
        return outputs if key == cls.XCOM_RETURN_KEY else outputs.get(key)
