"""The XCom backend in real runs: what tasks hand to each other, what the rows hold, what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.caching.decision import Decision, MissReason, RunPlan, StepDecision
from airflow_mlpipelines.definition.workspace import Workspace
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.dags.conftest import RunDag

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")

pytestmark = pytest.mark.airflow

ARTIFACT = Artifact("s3://bucket/clean/out", "blake3:" + "a" * 64, 12, 3, "dir", step_run="run-1")
LARGE = {"rows": ["x" * 100] * 1000}
FRAME = pd.DataFrame({"n": [1, 2], "t": pd.date_range("2024", periods=2, tz="UTC")})


@dataclasses.dataclass
class Score:
    """A class that Airflow's own serialization takes, where it is on the allow-list."""

    name: str
    value: float


@dataclasses.dataclass
class Handed:
    """What one run handed over: the values pulled, and the rows between."""

    values: dict[str, Any]
    rows: dict[str, Any]


def run_tasks(
    run_dag: RunDag, dag_id: str, *tasks: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """Run the functions as tasks, one after the other; return the rows of the run, task by task."""
    from airflow.models.xcom import XComModel
    from airflow.sdk import DAG
    from airflow.sdk import task as make_task
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with DAG(dag_id, schedule=None) as dag:
        previous = None
        for function in tasks:
            current = make_task(function)()
            if previous is not None:
                previous >> current
            previous = current
    run = run_dag(dag)
    assert run.state == "success"
    rows: dict[str, dict[str, Any]] = {}
    with create_session() as session:
        for row in session.scalars(select(XComModel).where(XComModel.run_id == run.run_id)):
            rows.setdefault(row.task_id, {})[row.key] = row.value
    return rows


def hand_over(run_dag: RunDag, dag_id: str, given: dict[str, Any]) -> Handed:
    """Push each value in one task and pull it in the next."""
    pulled: dict[str, Any] = {}

    def push(ti: Any) -> None:
        for key, value in given.items():
            ti.xcom_push(key=key, value=value)

    def pull(ti: Any) -> None:
        for key in given:
            pulled[key] = ti.xcom_pull(task_ids="push", key=key)

    rows = run_tasks(run_dag, dag_id, push, pull)
    return Handed(pulled, rows["push"])


def write_rows(ti: Any, rows: dict[str, Any]) -> None:
    """Put rows into the database as people, REST and other tasks can: past the backend."""
    from airflow.sdk.bases.xcom import BaseXCom

    for key, row in rows.items():
        BaseXCom._set_xcom_in_db(
            key, row, dag_id=ti.dag_id, task_id=ti.task_id, run_id=ti.run_id, map_index=-1
        )


# ---- what comes back -----------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "number": 7,
    "truth": False,
    "text": "hello",
    "text of json": '{"a": 1}',
    "text of a list": " [1, 2]",
    "text that only looks so": "{nothing",
    "text of a number": "2024",
    "mapping": {"a": [1, {"b": None}]},
    "own tag": {"$text": 1},
    "tuple": (1, "a"),
    "set": {1, 2},
    "time": dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
    "numpy number": np.float64(0.5),
    "large": LARGE,
    "large text": "{" + "x" * 100_000,
    "large with types": {"t": (dt.datetime(2024, 1, 1, tzinfo=dt.UTC),), "x": "x" * 100_000},
    "bytes": b"\x00\xff",
    "array": np.arange(6).reshape(2, 3),
    "frame": FRAME,
    "nested frames": {"train": FRAME, "more": [(FRAME, 1)]},
}


@pytest.fixture(scope="module")
def handed(run_dag: RunDag) -> Handed:
    return hand_over(run_dag, "xcom_values", VALUES)


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, pd.DataFrame):
        pd.testing.assert_frame_equal(left, right)
    elif isinstance(left, np.ndarray):
        np.testing.assert_array_equal(left, right, strict=True)
    else:
        assert left == right


@pytest.mark.parametrize("key", VALUES)
def test_a_value_comes_back_as_it_was(key: str, handed: Handed) -> None:
    assert_same(handed.values[key], VALUES[key])


@pytest.mark.parametrize("key", ["number", "truth", "text", "mapping", "text of a number"])
def test_the_row_of_a_small_json_value_is_the_value(key: str, handed: Handed) -> None:
    assert handed.rows[key] == VALUES[key]


@pytest.mark.parametrize(
    ("key", "media_type"),
    [
        ("large", "application/json"),
        ("large text", "application/json"),
        ("large with types", "application/json"),
        ("bytes", "application/octet-stream"),
        ("array", "application/x-npy"),
        ("frame", "application/vnd.apache.parquet; class=pandas"),
    ],
)
def test_the_row_of_data_is_a_reference(key: str, media_type: str, handed: Handed) -> None:
    artifact = Artifact.from_dict(handed.rows[key])
    assert (artifact.kind, artifact.media_type) == ("object", media_type)
    assert Path(artifact.uri.removeprefix("file://")).stat().st_size == artifact.size


def test_data_within_a_value_is_a_reference_too(handed: Handed) -> None:
    row = handed.rows["nested frames"]
    (in_a_tuple,) = row["more"]
    frame = handed.rows["frame"]
    assert (row["train"], in_a_tuple["__data__"]) == (frame, [frame, 1])


def test_artifacts_are_shown_and_pulled_in_their_tagged_form(run_dag: RunDag) -> None:
    given = {"one": ARTIFACT, "many": {"model": ARTIFACT, "plots": [ARTIFACT, None]}}
    handed = hand_over(run_dag, "xcom_artifacts", given)
    tagged = ARTIFACT.to_dict()
    expected = {"one": tagged, "many": {"model": tagged, "plots": [tagged, None]}}
    assert handed.rows == expected
    assert handed.values == expected


def test_what_the_scheduler_and_rest_clients_read_stays_plain_at_any_size(run_dag: RunDag) -> None:
    given = dict.fromkeys(["plan", "step_run", "skipmixin_key"], LARGE)
    handed = hand_over(run_dag, "xcom_plain", given)
    assert handed.rows == given
    assert handed.values == given


def test_the_threshold_is_what_the_deployment_says(
    run_dag: RunDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__MLPIPELINES__XCOM_THRESHOLD_BYTES", "9")
    handed = hand_over(run_dag, "xcom_threshold", {"fits": "1234567", "does not": "12345678"})
    assert handed.values == {"fits": "1234567", "does not": "12345678"}
    assert handed.rows["fits"] == "1234567"
    assert handed.rows["does not"]["media_type"] == "application/json"


def test_data_lies_on_the_default_datastore_of_the_workspace(
    run_dag: RunDag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "mlpipelines.yaml"
    config.write_text(
        "name: here\ndefault_datastore: lake\n"
        f"datastores:\n  lake: {{url: 'file://{tmp_path}/lake'}}\n"
        f"  other: {{url: 'file://{tmp_path}/other'}}\n"
    )
    monkeypatch.setenv("MLPIPELINES_CONFIG", str(config))
    handed = hand_over(run_dag, "xcom_workspace", {"frame": FRAME})
    assert handed.rows["frame"]["uri"].startswith(f"file://{tmp_path}/lake/objects/")
    assert_same(handed.values["frame"], FRAME)


def test_a_class_comes_back_only_if_airflow_allows_it(
    run_dag: RunDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk import serde

    monkeypatch.setattr(serde, "_extra_allowed", set())

    def push(ti: Any) -> None:
        ti.xcom_push(key="score", value=Score("auc", 0.9))

    def pull(ti: Any) -> None:
        with pytest.raises(ImportError, match="not found in allow list"):
            ti.xcom_pull(task_ids="push", key="score")
        serde.allow_class(Score)
        assert ti.xcom_pull(task_ids="push", key="score") == Score("auc", 0.9)

    run_tasks(run_dag, "xcom_classes", push, pull)


def test_mapped_tasks_take_and_give_data(run_dag: RunDag) -> None:
    from airflow.sdk import DAG, task

    seen: dict[str, Any] = {}

    @task
    def split() -> list[Any]:
        return [FRAME, FRAME.assign(n=[3, 4])]

    @task
    def double(part: Any) -> Any:
        return part.assign(n=part["n"] * 2)

    @task
    def join(parts: Any) -> None:
        seen["numbers"] = [part["n"].tolist() for part in parts]

    with DAG("xcom_mapped", schedule=None) as dag:
        join(double.expand(part=split()))
    assert run_dag(dag).state == "success"
    assert seen["numbers"] == [[2, 4], [6, 8]]


def test_what_a_triggers_last_event_brings_is_decoded_once_more(run_dag: RunDag) -> None:
    """Airflow's scheduler writes these as JSON text of JSON (``TaskInstance.xcom_push``)."""
    from airflow.models.xcom import XComModel

    given = {"output": ARTIFACT.to_dict(), "list": [1, {"a": 2}], "text": "hello"}
    pulled = {}

    def push(ti: Any) -> None:
        write_rows(ti, {key: XComModel.serialize_value(value) for key, value in given.items()})

    def pull(ti: Any) -> None:
        for key in given:
            pulled[key] = ti.xcom_pull(task_ids="push", key=key)

    rows = run_tasks(run_dag, "xcom_events", push, pull)["push"]
    assert isinstance(rows["output"], str)
    # A bare string can't be told from one that was encoded once too often, and stays as it is.
    assert pulled == {**given, "text": '"hello"'}


# ---- what is refused -----------------------------------------------------------------------------


def test_a_value_without_a_form_fails_its_task_with_the_ways_out(run_dag: RunDag) -> None:
    def push(ti: Any) -> None:
        for value in (object(), {"model": object()}, [{1j}]):
            with pytest.raises(DataError, match="allow_pickle"):
                ti.xcom_push(key="model", value=value)

    assert "push" not in run_tasks(run_dag, "xcom_refused", push)


def test_a_pickle_is_handed_over_where_the_deployment_allows_it(
    run_dag: RunDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__MLPIPELINES__ALLOW_PICKLE", "True")
    handed = hand_over(run_dag, "xcom_pickle", {"model": {1: complex(0, 1)}})
    assert handed.values["model"] == {1: 1j}
    assert handed.rows["model"]["media_type"] == "application/x-python-pickle"


@pytest.mark.parametrize("component", ["api-server", "triggerer", "dag-processor"])
def test_no_pickle_is_read_where_no_tasks_run(
    component: str, run_dag: RunDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPELINES_ALLOW_PICKLE", "1")

    def push(ti: Any) -> None:
        ti.xcom_push(key="model", value={1: 1j})

    def pull(ti: Any) -> None:
        with monkeypatch.context() as there:
            there.setattr(sys, "argv", ["airflow", component])
            with pytest.raises(DataError, match="is none that runs tasks"):
                ti.xcom_pull(task_ids="push", key="model")
        assert ti.xcom_pull(task_ids="push", key="model") == {1: 1j}

    run_tasks(run_dag, f"xcom_shared_{component}", push, pull)


def test_no_pickle_is_written_where_there_is_no_task(
    airflow_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow_mlpipelines.xcom import DataReferenceXComBackend as Backend

    monkeypatch.setenv("MLPIPELINES_ALLOW_PICKLE", "1")
    with pytest.raises(DataError, match="can't be handed on"):
        Backend.serialize_value({1: 1j})


def test_a_reference_whose_data_is_gone_is_an_error_and_no_path(run_dag: RunDag) -> None:
    def push(ti: Any) -> None:
        ti.xcom_push(key="data", value=b"soon gone")

    def pull(ti: Any) -> None:
        from airflow.models.xcom import XComModel
        from airflow.utils.session import create_session

        with create_session() as session:
            row = session.query(XComModel).filter_by(run_id=ti.run_id, key="data").one().value
        Path(row["uri"].removeprefix("file://")).unlink()
        with pytest.raises(DataError, match="is gone"):
            ti.xcom_pull(task_ids="push", key="data")

    run_tasks(run_dag, "xcom_gone", push, pull)


def hostile_rows(secret: Path) -> dict[str, Any]:
    """Rows that somebody edited, so that pulling one reads or runs what it should not."""
    from airflow_mlpipelines._digest import digest_bytes

    data = secret.read_bytes()
    honest = {
        "$artifact": 1,
        "uri": "",
        "digest": f"blake3:{digest_bytes(data)}",
        "size": len(data),
        "files": 1,
        "kind": "object",
        "media_type": "application/octet-stream",
    }
    store = Workspace.embedded().default_datastore.spec.url
    uris = {
        "file": f"file://{secret}",
        "path": str(secret),
        "metadata service": "http://169.254.169.254/latest",
        "foreign bucket": "s3://foreign/objects/x",
        "climbing": f"{store}/{'../' * 20}{secret}",
        "quoted climbing": f"{store}/{'%2e%2e/' * 20}{secret}",
        "the datastore itself": store,
    }
    rows = {name: {**honest, "uri": uri} for name, uri in uris.items()}
    rows["text of it"] = json.dumps(rows["file"])
    rows["nested"] = {"a": [rows["file"]]}
    rows["newer"] = {**rows["file"], "$artifact": 2}
    rows["malformed"] = {"$artifact": 1, "kind": "object", "uri": 7}
    rows["pickle"] = {**rows["file"], "media_type": "application/x-python-pickle"}
    return rows


def test_an_edited_reference_reads_nothing(run_dag: RunDag, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("for nobody")
    rows = hostile_rows(secret)
    refused = []

    def push(ti: Any) -> None:
        write_rows(ti, rows)

    def pull(ti: Any) -> None:
        for key in rows:
            with pytest.raises(DataError):
                ti.xcom_pull(task_ids="push", key=key)
            refused.append(key)

    run_tasks(run_dag, "xcom_hostile", push, pull)
    assert refused == list(rows)


def test_a_row_that_names_a_class_makes_no_object_of_it(run_dag: RunDag) -> None:
    row = {"__classname__": "subprocess.Popen", "__version__": 1, "__data__": {"args": "true"}}

    def push(ti: Any) -> None:
        write_rows(ti, {"plain": row, "text of it": json.dumps(row)})
        ti.xcom_push(key="large", value={"x": "x" * 100_000})

    def pull(ti: Any) -> None:
        for key in ("plain", "text of it"):
            with pytest.raises(ImportError, match="allow list"):
                ti.xcom_pull(task_ids="push", key=key)

    run_tasks(run_dag, "xcom_class_names", push, pull)


def test_deleting_an_xcom_leaves_data_that_another_one_refers_to(run_dag: RunDag) -> None:
    def push(ti: Any) -> None:
        from airflow.sdk.execution_time.xcom import XCom

        ti.xcom_push(key="one", value=b"shared")
        ti.xcom_push(key="other", value=b"shared")
        XCom.delete("one", task_id=ti.task_id, dag_id=ti.dag_id, run_id=ti.run_id)

    def pull(ti: Any) -> None:
        assert ti.xcom_pull(task_ids="push", key="one") is None
        assert ti.xcom_pull(task_ids="push", key="other") == b"shared"

    run_tasks(run_dag, "xcom_purge", push, pull)


# ---- reused steps --------------------------------------------------------------------------------

PLAN = RunPlan(
    steps={
        "train": StepDecision(
            Decision.REUSE,
            "nothing changed",
            fingerprint="f" * 64,
            outputs={"model": ARTIFACT},
            step_run="run-1",
            seconds_saved=12.5,
        ),
        "report": StepDecision(Decision.RUN, "never run", miss=MissReason.NEVER_RUN),
    }
)
TAGGED = ARTIFACT.to_dict()


class AsyncComms:
    """``dag.test()`` has no way to ask Airflow's API from a coroutine; this one blocks."""

    def __init__(self, comms: Any) -> None:
        self.send = comms.send

    async def asend(self, msg: Any) -> Any:
        return self.send(msg)


def pull_everywhere(ti: Any, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pull from a reused step, and from others, in each of the ways that Airflow has."""
    from airflow.sdk.execution_time import task_runner

    train, report = f"{prefix}train", f"{prefix}report"
    assert ti.xcom_pull(task_ids=train) == {"model": TAGGED}
    assert ti.xcom_pull(task_ids=train, map_indexes=None) == {"model": TAGGED}
    assert ti.xcom_pull(task_ids=train, key="model") == TAGGED
    assert ti.xcom_pull(task_ids=[train, report], key="model") == [TAGGED, None]
    assert ti.xcom_pull(task_ids=train, key="step_run") == {
        "state": "reused",
        "reason": "nothing changed",
        "seconds": 0.0,
        "seconds_saved": 12.5,
        "fingerprint": "f" * 64,
        "step_run": "run-1",
    }
    for nothing in (train, report, f"{prefix}nowhere", f"{prefix}cache_sensor"):
        assert ti.xcom_pull(task_ids=nothing, key="other", map_indexes=None, default=1) == 1

    async def pull() -> None:
        assert await ti.axcom_pull(task_ids=train) == {"model": TAGGED}
        assert await ti.axcom_pull(task_ids=train, key="model", map_indexes=None) == TAGGED
        assert await ti.axcom_pull(task_ids=report, map_indexes=None) is None

    with monkeypatch.context() as there:
        there.setattr(task_runner, "SUPERVISOR_COMMS", AsyncComms(task_runner.SUPERVISOR_COMMS))
        asyncio.run(pull())


def test_a_reused_step_answers_as_if_it_had_run(
    run_dag: RunDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache_sensor(ti: Any) -> None:
        ti.xcom_push(key="plan", value=PLAN.to_dict())

    def pull(ti: Any) -> None:
        pull_everywhere(ti, "", monkeypatch)

    run_tasks(run_dag, "xcom_reused", cache_sensor, pull)


def test_a_reused_step_in_a_task_group_answers_too(
    run_dag: RunDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk import DAG, TaskGroup, task

    with DAG("xcom_reused_in_group", schedule=None) as dag:
        with TaskGroup("outer"), TaskGroup("pipeline"):

            @task
            def cache_sensor(ti: Any) -> None:
                ti.xcom_push(key="plan", value=PLAN.to_dict())

            planned = cache_sensor()

        @task
        def pull(ti: Any) -> None:
            pull_everywhere(ti, "outer.pipeline.", monkeypatch)
            assert ti.xcom_pull(task_ids="train", map_indexes=None) is None

        planned >> pull()
    assert run_dag(dag).state == "success"


def test_what_a_cleared_step_pushed_comes_before_the_plan(run_dag: RunDag) -> None:
    def cache_sensor(ti: Any) -> None:
        ti.xcom_push(key="plan", value=PLAN.to_dict())

    def train() -> dict[str, str]:
        return {"model": "made again"}

    def pull(ti: Any) -> None:
        assert ti.xcom_pull(task_ids="train") == {"model": "made again"}

    run_tasks(run_dag, "xcom_cleared", cache_sensor, train, pull)


def test_somebody_elses_plan_is_left_alone(run_dag: RunDag) -> None:
    def cache_sensor(ti: Any) -> None:
        ti.xcom_push(key="plan", value={"breakfast": "eggs"})

    def pull(ti: Any) -> None:
        assert ti.xcom_pull(task_ids="train", map_indexes=None) is None
        assert ti.xcom_pull(task_ids="cache_sensor", key="plan") == {"breakfast": "eggs"}

    run_tasks(run_dag, "xcom_foreign_plan", cache_sensor, pull)


# ---- the class -----------------------------------------------------------------------------------


def test_airflow_3_4_stores_in_the_same_way(airflow_db: Path) -> None:
    from airflow_mlpipelines.xcom import DataReferenceXComBackend as Backend

    stored = Backend.store_value(object(), "frame", ARTIFACT)
    assert stored == Backend.serialize_value(ARTIFACT, key="frame", task_id="t", dag_id="d")
    assert Backend.store_value(object(), "plan", LARGE) == LARGE


def test_importing_the_backend_costs_nothing_beyond_airflows_own() -> None:
    """Every task process imports it."""
    program = (
        "import json, sys\n"
        "import airflow.sdk.bases.xcom\n"
        "before = set(sys.modules)\n"
        "import airflow_mlpipelines.xcom\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    environment = {**os.environ, "AIRFLOW__CORE__XCOM_BACKEND": "airflow.sdk.bases.xcom.BaseXCom"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # Airflow itself may have imported our package by now, for the provider's description.
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {
        "airflow_mlpipelines",
        "airflow_mlpipelines.settings",
        "airflow_mlpipelines.xcom",
    }
