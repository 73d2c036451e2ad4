"""XCom backend: data travels by reference, and a reused step answers as if it had run.

``[core] xcom_backend = airflow_mlpipelines.xcom.DataReferenceXComBackend``

A deployment has one backend for all its DAGs, so this one leaves alone what it need not touch. What the
row of an XCom holds, which is also what the UI and the REST API show:

- an :class:`~airflow_mlpipelines.storage.artifact.Artifact`: its tagged JSON form, and so it comes back;
- a table, an array, bytes: the tagged form of an artifact of the kind ``object``; the value is a file of
  the default datastore, and comes back as the value;
- other values: what Airflow itself makes of them; above ``[mlpipelines] xcom_threshold_bytes`` an object
  too;
- a string that reads as a JSON object or list: ``{"$text": …}``, since a bare one is taken for JSON that
  was encoded twice. Airflow does that to the XComs that a trigger's last event brings along.

What is read back may have been edited by people and by other tasks. See :mod:`storage.objects
<airflow_mlpipelines.storage.objects>` for what that can and can't bring about.
"""

from __future__ import annotations

import json
import os
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.xcom import BaseXCom

from airflow_mlpipelines import settings

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.storage.stores import StoreSet

DEFAULT_THRESHOLD_BYTES = 65_536
"""What Airflow's own task state store holds, and a row that the UI still shows at once."""

_PLAN_KEY = "plan"
_PLAN_TASK = "cache_sensor"
_FINISH_TASK = "finish"
_STEP_RUN_KEY = "step_run"
_PLAIN_KEYS = frozenset({_PLAN_KEY, _STEP_RUN_KEY, "skipmixin_key"})
"""Read by the scheduler or over REST, where nothing resolves a reference."""
_TEXT_TAG = "$text"
_COMPONENTS_WITHOUT_TASKS = frozenset({"api-server", "dag-processor", "triggerer"})


class DataReferenceXComBackend(BaseXCom):
    """Airflow's XCom with two things more.

    A pull from a step that was reused, or from ``finish``, is answered from the plan of the run, so that
    nobody who pulls needs to know. Values too large for a database row, or not JSON (DataFrames, arrays, models), go to
    the default datastore by digest and come back as the value.
    """

    @staticmethod
    def serialize_value(value: Any, *, key: str | None = None, **coordinate: Any) -> Any:
        """Return the JSON that the XCom's row holds for ``value``.

        Args:
            value: Whatever a task pushes.
            key: The XCom's key. Some are read where nothing resolves a reference, and stay plain.
            **coordinate: Whose XCom it is. It does not count: data is named by its content.

        Raises:
            DataError: The value has no form as data; names the ways out.
        """
        del coordinate
        if key in _PLAIN_KEYS:
            return BaseXCom.serialize_value(value)
        return _to_row(value)

    @staticmethod
    def deserialize_value(result: Any) -> Any:
        """Return the value that the row ``result.value`` stands for.

        Raises:
            DataError: It refers to data that is gone, changed, or not ours to read. Never is the
                reference returned in its place.
        """
        return _from_row(result.value)

    @classmethod
    def store_value(cls, coordinate: Any, key: str, value: Any) -> Any:
        """Return the JSON for the XCom's row, as :meth:`serialize_value`; Airflow 3.4 calls it this way."""
        del coordinate
        return cls.serialize_value(value, key=key)

    @classmethod
    def purge(cls, xcom: Any, *args: Any) -> None:
        """Do nothing: an object belongs to its content, and another XCom may refer to the same one.

        Airflow calls this for the XComs of a task that starts again, and not at all when a run or an
        XCom is deleted in the UI. So objects can only be collected by looking at all references.
        """

    @classmethod
    def get_one(cls, *, key: str, dag_id: str, task_id: str, run_id: str, **options: Any) -> Any:
        """Return a value as Airflow does, or, from a reused step, what the plan reuses."""
        value = super().get_one(key=key, dag_id=dag_id, task_id=task_id, run_id=run_id, **options)
        if value is None and (plan_task := _plan_task(task_id, key)):
            # All of the one there is: Airflow logs an error where a single XCom is not found.
            plans = super().get_all(key=_PLAN_KEY, dag_id=dag_id, task_id=plan_task, run_id=run_id)
            return _answer_from_plan(plans, dag_id, run_id, task_id, key)
        return value

    @classmethod
    async def aget_one(
        cls, *, key: str, dag_id: str, task_id: str, run_id: str, **options: Any
    ) -> Any:
        """Return what :meth:`get_one` returns; asks Airflow's API without blocking the event loop."""
        value = await super().aget_one(
            key=key, dag_id=dag_id, task_id=task_id, run_id=run_id, **options
        )
        if value is None and (plan_task := _plan_task(task_id, key)):
            plans = await super().aget_all(
                key=_PLAN_KEY, dag_id=dag_id, task_id=plan_task, run_id=run_id
            )
            return _answer_from_plan(plans, dag_id, run_id, task_id, key)
        return value

    @classmethod
    def get_all(cls, *, key: str, dag_id: str, task_id: str, run_id: str, **options: Any) -> Any:
        """Return all values as Airflow does, or, from a reused step, the one that the plan reuses."""
        values = super().get_all(key=key, dag_id=dag_id, task_id=task_id, run_id=run_id, **options)
        if not values and (plan_task := _plan_task(task_id, key)):
            plans = super().get_all(key=_PLAN_KEY, dag_id=dag_id, task_id=plan_task, run_id=run_id)
            value = _answer_from_plan(plans, dag_id, run_id, task_id, key)
            return values if value is None else [value]
        return values

    @classmethod
    async def aget_all(
        cls, *, key: str, dag_id: str, task_id: str, run_id: str, **options: Any
    ) -> Any:
        """Return what :meth:`get_all` returns; asks Airflow's API without blocking the event loop."""
        values = await super().aget_all(
            key=key, dag_id=dag_id, task_id=task_id, run_id=run_id, **options
        )
        if not values and (plan_task := _plan_task(task_id, key)):
            plans = await super().aget_all(
                key=_PLAN_KEY, dag_id=dag_id, task_id=plan_task, run_id=run_id
            )
            value = _answer_from_plan(plans, dag_id, run_id, task_id, key)
            return values if value is None else [value]
        return values


# ---- a reused step's XComs -----------------------------------------------------------------------


def _plan_task(task_id: str, key: str) -> str | None:
    """Return the task whose plan may know what ``task_id`` would have pushed, or None."""
    group, _, step_id = task_id.rpartition(".")
    if step_id == _PLAN_TASK or key == _PLAN_KEY:
        return None
    return f"{group}.{_PLAN_TASK}" if group else _PLAN_TASK


def _answer_from_plan(
    plans: list[Any] | None, dag_id: str, run_id: str, task_id: str, key: str
) -> Any:
    """Return what a task that no process ran for would have pushed under ``key``, or None."""
    data = plans[0] if plans else None
    if not isinstance(data, dict) or "steps" not in data:  # another task of that name, not ours
        return None
    from airflow_mlpipelines.caching.decision import Decision, RunPlan

    group, _, step_id = task_id.rpartition(".")
    if step_id == _FINISH_TASK and key == BaseXCom.XCOM_RETURN_KEY:
        return _summarize(RunPlan.from_dict(data), dag_id, run_id, f"{group}." if group else "")
    decision = RunPlan.from_dict(data, only=(step_id,)).steps.get(step_id)
    if decision is None or decision.decision is not Decision.REUSE:
        return None
    if key == _STEP_RUN_KEY:
        return {
            "state": "reused",
            "reason": decision.reason,
            "seconds": 0.0,
            "seconds_saved": decision.seconds_saved or 0.0,
            "fingerprint": decision.fingerprint,
            "step_run": decision.step_run,
        }
    outputs = {name: artifact.to_dict() for name, artifact in decision.outputs.items()}
    return outputs if key == BaseXCom.XCOM_RETURN_KEY else outputs.get(key)


def _summarize(plan: RunPlan, dag_id: str, run_id: str, prefix: str) -> dict[str, Any]:
    """Return what the pipeline's last task offers: the summary of the run."""
    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.execution.summary import summarize_run
    from airflow_mlpipelines.operators.connections import metadata_url

    index = MetadataIndex(metadata_url())
    return summarize_run(plan, index, dag_id=dag_id, run_id=run_id, prefix=prefix)


# ---- values and rows -----------------------------------------------------------------------------


def _to_row(value: Any) -> Any:
    from airflow.sdk.serde import serialize

    try:
        row = serialize(_offload(value))
    except TypeError:  # serde's word for a class that it can't take
        return _write(value)
    if len(json.dumps(row)) > _threshold_bytes():
        return _write(row)
    return {_TEXT_TAG: row} if _decode_container(row) is not None else row


def _from_row(row: Any) -> Any:
    from airflow.sdk.serde import deserialize

    if isinstance(row, dict) and row.keys() == {_TEXT_TAG} and isinstance(row[_TEXT_TAG], str):
        return row[_TEXT_TAG]
    decoded = _decode_container(row)
    return _resolve(deserialize(row if decoded is None else decoded))


def _decode_container(row: Any) -> dict[str, Any] | list[Any] | None:
    """Return the object or list that a string is the JSON of, or None."""
    if not isinstance(row, str) or not row.lstrip().startswith(("{", "[")):
        return None
    try:
        decoded = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, (dict, list)) else None


def _offload(value: Any) -> Any:
    """Return ``value`` with every artifact, table, array and bytes in it as tagged JSON."""
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.objects import has_own_format

    if isinstance(value, Artifact):
        return value.to_dict()
    if has_own_format(value):
        return _write(value)
    kind = type(value)
    if kind is dict:
        return {name: _offload(item) for name, item in value.items()}
    if kind is list or kind is tuple:
        return kind(_offload(item) for item in value)
    return value


def _resolve(value: Any) -> Any:
    """Return ``value`` with every artifact of the kind ``object`` replaced by what it refers to."""
    from airflow_mlpipelines.storage.artifact import is_artifact

    kind = type(value)
    if kind is dict:
        if is_artifact(value):
            return _read(value) if value.get("kind") == "object" else value
        return {name: _resolve(item) for name, item in value.items()}
    if kind is list or kind is tuple:
        return kind(_resolve(item) for item in value)
    return value


def _write(value: Any) -> dict[str, Any]:
    from airflow_mlpipelines.storage.objects import write_object

    store = _open_stores().default
    return write_object(value, store, allow_pickle=_is_pickle_allowed()).to_dict()


def _read(data: dict[str, Any]) -> Any:
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.objects import is_json, read_object

    artifact = Artifact.from_dict(data)
    value = read_object(artifact, _open_stores(), allow_pickle=_is_pickle_allowed())
    if is_json(artifact):  # what Airflow made of the value, as it would have been in the row
        from airflow.sdk.serde import deserialize

        return _resolve(deserialize(value))
    return value


def _open_stores() -> StoreSet:
    """Return the default datastore of this deployment's workspace: the only one that objects lie in."""
    return _open_stores_of(os.environ.get(settings.CONFIG_VARIABLE), settings.home())


@lru_cache(maxsize=8)  # a task process needs one; tests and `dag.test()` may need several
def _open_stores_of(config_file: str | None, home: Path) -> StoreSet:
    from airflow_mlpipelines.definition.workspace import Workspace
    from airflow_mlpipelines.operators.connections import open_datastore
    from airflow_mlpipelines.storage.stores import StoreSet

    del home  # part of the key alone: the embedded default workspace lies in it
    workspace = Workspace.from_config(config_file) if config_file else Workspace.embedded()
    spec = workspace.get_default_datastore().spec
    return StoreSet([open_datastore(spec)], default=spec.name)


def _threshold_bytes() -> int:
    from airflow.sdk.configuration import conf

    return int(
        conf.getint(
            settings.CONFIG_SECTION, "xcom_threshold_bytes", fallback=DEFAULT_THRESHOLD_BYTES
        )
    )


def _is_pickle_allowed() -> bool:
    """Whether this deployment uses pickles, and this is a process that runs tasks."""
    from airflow.sdk.configuration import conf
    from airflow.sdk.execution_time import task_runner

    # As Airflow itself tells: only what runs the code of users has a supervisor to talk to.
    has_supervisor = getattr(task_runner, "SUPERVISOR_COMMS", None) is not None
    if not has_supervisor or not _COMPONENTS_WITHOUT_TASKS.isdisjoint(sys.argv[1:2]):
        return False
    return settings.allow_pickle(
        configured=conf.getboolean(settings.CONFIG_SECTION, "allow_pickle", fallback=False)
    )
