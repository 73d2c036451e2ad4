"""Airflow with all of its processes: triggered over REST, and read back over REST."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from airflow_mlpipelines import CommandStep, KubernetesCompute, Pipeline, Workspace
from airflow_mlpipelines.cli.files import load_pipelines
from airflow_mlpipelines.exceptions import SubmissionError
from airflow_mlpipelines.submission.remote import submit_over_rest

pytestmark = pytest.mark.stack

DAGS = Path(__file__).parents[2] / "dags"
GROUP = r'''
"""A pipeline inside somebody's own DAG of airflow."""
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from airflow_mlpipelines import CommandStep, Pipeline, PipelineData, Workspace

made = PipelineData("made")
make = CommandStep(["sh", "-c", f"echo hello > {made}"], name="make", outputs=[made])
show = CommandStep(["cat", made], name="show", inputs=[made])
with DAG("grouped", schedule=None):
    load = BashOperator(task_id="load", bash_command="true")
    group = Pipeline(Workspace.from_config(), [make, show], name="steps").to_task_group()
    notify = BashOperator(
        task_id="notify",
        bash_command="""
            echo '{{ ti.xcom_pull(task_ids="steps.make", key="made")["size"] }} bytes'
            echo '{{ ti.xcom_pull(task_ids="steps.finish") }}'
        """,
    )
    load >> group >> notify
'''
SLOW = '''
"""Steps that take their time, for airflow to end them. A dag."""
import sys
from airflow_mlpipelines import CommandStep, LocalCompute, Pipeline, PipelineData, Workspace

for name in ("slow_one", "slow_two"):
    out = PipelineData("out")
    step = CommandStep(
        ["sh", "-c", f"echo started; sleep 5; date +%N > {out}; echo over"], name="sleep", outputs=[out]
    )
    globals()[name] = Pipeline(Workspace.from_config(), [step], name=name).to_dag()
ws = Workspace.from_config()
few = Pipeline(
    ws, [CommandStep(["true"], name="one", compute_target=LocalCompute("few", max_nodes=1))], name="few"
)
few_dag = few.to_dag()
endless = Pipeline(
    Workspace.from_config(),
    [CommandStep(["sh", "-c", "echo started; exec sleep 987654"], name="wait")],
    name="endless",
).to_dag()
'''


@pytest.fixture(scope="module")
def airflow(stack, client):
    """The client of an Airflow that knows the DAGs of these tests."""
    # Without its schedule: in the first tenth of an interval, Airflow starts a run of its own as soon as the DAG may run,
    # and then whichever run is there first does the work.
    first_pipeline = (DAGS / "first_pipeline.py").read_text()
    assert 'schedule="@daily"' in first_pipeline
    (stack.dags_folder / "first_pipeline.py").write_text(
        first_pipeline.replace('schedule="@daily"', "schedule=None")
    )
    shutil.copytree(DAGS / "first_pipeline", stack.dags_folder / "first_pipeline")
    (stack.dags_folder / "grouped.py").write_text(GROUP)
    (stack.dags_folder / "slow.py").write_text(SLOW)
    for dag_id in ("first_pipeline", "grouped", "slow_one", "slow_two", "endless"):
        wait_for(lambda dag_id=dag_id: client.find_dag(dag_id), what=f"DAG {dag_id}", client=client)
        client.unpause(dag_id)
    return client


def wait_for(condition, *, what, client=None, seconds=60):
    """Return what the condition returns once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            errors = client.list_import_errors() if client is not None else ""
            raise AssertionError(f"{what} did not come within {seconds} s. {errors}")
        time.sleep(0.2)


def finish(airflow, dag_id, run_id):
    """Return the states of a run's tasks, once it is over."""
    wait_for(
        lambda: airflow.get_run(dag_id, run_id)["state"] in ("success", "failed"),
        what=f"the end of {run_id}",
    )
    return {task["task_id"]: task["state"] for task in airflow.list_task_instances(dag_id, run_id)}


def run(airflow, dag_id, conf=None):
    """Trigger a run; return its id and the states of its tasks at the end."""
    run_id = airflow.trigger(dag_id, conf)
    return run_id, finish(airflow, dag_id, run_id)


def test_a_run_over_rest_and_a_second_one_that_reuses_it(airflow):
    first, states = run(airflow, "first_pipeline")
    assert set(states.values()) == {"success"}
    artifact = airflow.find_xcom("first_pipeline", first, "publish", "report")
    text = Path(artifact["uri"].removeprefix("file://")).read_text()
    assert text.splitlines()[0] == "the: 3"

    second, states = run(airflow, "first_pipeline")

    assert states == {
        "cache_sensor": "success",
        "count": "skipped",
        "publish": "skipped",
        "finish": "success",
    }
    assert airflow.find_xcom("first_pipeline", second, "publish", "report") == artifact
    plan = airflow.find_xcom("first_pipeline", second, "cache_sensor", "plan")
    assert {name: step["decision"] for name, step in plan["steps"].items()} == {
        "count": "reuse",
        "publish": "reuse",
    }
    started = {
        task["task_id"]
        for task in airflow.list_task_instances("first_pipeline", second)
        if task["pid"]
    }
    assert started == {"cache_sensor"}  # the one process of a run that reuses everything


def test_a_parameter_is_checked_and_reruns_the_step_that_uses_it(airflow):
    run(airflow, "first_pipeline")
    with pytest.raises(SubmissionError, match="minimum"):
        airflow.trigger("first_pipeline", {"top": 0})

    run_id, states = run(airflow, "first_pipeline", {"top": 1})

    assert (states["count"], states["publish"]) == ("skipped", "success")
    record = airflow.find_xcom("first_pipeline", run_id, "publish", "step_run")
    assert record["reason"] == "top 3 -> 1"


def test_clearing_a_reused_step_runs_it(airflow):
    run(airflow, "first_pipeline")
    run_id, states = run(airflow, "first_pipeline")
    assert states["count"] == "skipped"

    airflow.clear("first_pipeline", run_id, ["count"])
    wait_for(
        lambda: airflow.find_xcom("first_pipeline", run_id, "count", "step_run"),
        what="the cleared step",
    )
    states = finish(airflow, "first_pipeline", run_id)

    assert states["count"] == "success"
    record = airflow.find_xcom("first_pipeline", run_id, "count", "step_run")
    assert (record["state"], record["reason"]) == ("ran", "cleared by hand")


def test_what_is_chained_behind_a_group_runs_whether_steps_ran_or_not(airflow):
    for expected, counts in (("success", "'ran': 2"), ("skipped", "'reused': 2")):
        run_id, states = run(airflow, "grouped")
        assert states["steps.make"] == states["steps.show"] == expected
        assert states["notify"] == "success"
        log = airflow.get_log("grouped", run_id, "notify", 1)
        assert any("6 bytes" in line for line in log)
        assert any(counts in line for line in log)  # the summary of a task that started no process


def test_two_runs_that_want_the_same_work_do_it_once(airflow):
    one = airflow.trigger("slow_one")
    wait_for(
        lambda: any("started" in line for line in airflow.get_log("slow_one", one, "sleep", 1)),
        what="the first of the two",
    )
    two = airflow.trigger("slow_two")
    seen = set()

    def over():
        tasks = airflow.list_task_instances("slow_two", two)
        seen.update(task["state"] for task in tasks if task["task_id"] == "sleep")
        return airflow.get_run("slow_two", two)["state"] in ("success", "failed")

    wait_for(over, what="the second of the two")
    log = "\n".join(airflow.get_log("slow_two", two, "sleep", 1))

    assert "deferred" in seen, log  # it waited without a worker slot
    assert finish(airflow, "slow_one", one)["sleep"] == "success"
    assert finish(airflow, "slow_two", two)["sleep"] == "skipped", log
    made = airflow.find_xcom("slow_one", one, "sleep", "out")
    assert airflow.find_xcom("slow_two", two, "sleep", "out") == made
    assert airflow.find_xcom("slow_two", two, "sleep", "step_run")["state"] == "reused"


def test_log_lines_arrive_while_the_step_runs_and_a_stopped_run_leaves_nothing(airflow):
    run_id = airflow.trigger("endless")
    wait_for(
        lambda: any("started" in line for line in airflow.get_log("endless", run_id, "wait", 1)),
        what="the first line",
    )
    assert sleepers()

    airflow.cancel("endless", run_id)

    wait_for(lambda: not sleepers(), what="the end of the program", seconds=30)


def test_a_compute_with_max_nodes_wants_its_pool(airflow, stack):
    [pipeline] = [
        found for found in load_pipelines(stack.dags_folder / "slow.py") if found.name == "few"
    ]
    with pytest.raises(SubmissionError, match="airflow pools set mlpipelines_few 1"):
        submit_over_rest(pipeline, {}, client=airflow)


def test_a_pool_for_pods_has_to_count_deferred_tasks(airflow):
    compute = KubernetesCompute("pods", image="x", max_nodes=2)
    step = CommandStep(["true"], name="one", compute_target=compute)
    pipeline = Pipeline(Workspace.from_config(), [step], name="not_there")
    command = "airflow pools set --include-deferred mlpipelines_pods 2"
    with pytest.raises(SubmissionError, match=f"none of that name.*{command}"):
        submit_over_rest(pipeline, {}, client=airflow)
    pool = {"name": "mlpipelines_pods", "slots": 2, "include_deferred": False}
    airflow._send("POST", "/api/v2/pools", json=pool).raise_for_status()
    with pytest.raises(SubmissionError, match=f"does not count deferred tasks.*{command}"):
        submit_over_rest(pipeline, {}, client=airflow)
    pool["include_deferred"] = True
    airflow._send("PATCH", "/api/v2/pools/mlpipelines_pods", json=pool).raise_for_status()
    with pytest.raises(SubmissionError, match="has no DAG 'not_there'"):
        submit_over_rest(pipeline, {}, client=airflow)


def sleepers():
    """Return the processes of the endless step."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"987654" in command:
            found.append(entry.parent.name)
    return found
