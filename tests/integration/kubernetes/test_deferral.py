"""Steps on a real cluster under a real Airflow with all of its processes, triggered and read back over REST."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient
from tests.integration.kubernetes.steps import IMAGE, make_api, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kubernetes, pytest.mark.stack]

DAG = '''
"""Steps in pods, for airflow to wait for. A dag."""
from airflow_mlpipelines import CommandStep, KubernetesCompute, Pipeline, PipelineData, Workspace

ws = Workspace.from_config()
cluster = KubernetesCompute(
    "cluster", namespace={namespace!r}, image={image!r}, in_cluster=False, defer_after_seconds=2
)
count = """
import os, sys, time
for number in range(int(sys.argv[1])):
    print("number", number, flush=True)
    time.sleep(0.1)
open(sys.argv[2], "w").write("counted " + sys.argv[1])
"""
for name, numbers in (("counting", 200), ("endless", 100000)):
    out = PipelineData("out")
    step = CommandStep(
        ["python3", "-c", count, str(numbers), out], name="count", outputs=[out],
        compute_target=cluster, allow_reuse=False,
    )
    globals()[name] = Pipeline(ws, [step], name=name).to_dag()
'''


@pytest.fixture(scope="module")
def airflow(cluster: Any, tmp_path_factory: Any) -> Iterator[AirflowClient]:
    home = tmp_path_factory.mktemp("airflow")
    dags = home / "dags"
    dags.mkdir()
    (dags / "pods.py").write_text(DAG.format(namespace=cluster.namespace, image=IMAGE))
    settings = {"KUBECONFIG": str(cluster.kubeconfig)}
    with AirflowStack(home, dags, settings=settings) as stack:
        client = AirflowClient(stack.url, username=stack.username, password=stack.password)
        for dag_id in ("counting", "endless"):
            wait_until(lambda dag_id=dag_id: client.find_dag(dag_id), f"DAG {dag_id} is there")
            client.unpause(dag_id)
        yield client


def state(airflow: AirflowClient, dag_id: str, run_id: str, task_id: str = "count") -> Any:
    tasks = airflow.list_task_instances(dag_id, run_id)
    return next(task["state"] for task in tasks if task["task_id"] == task_id)


def numbers(airflow: AirflowClient, dag_id: str, run_id: str, try_number: int = 1) -> list[int]:
    log = airflow.get_log(dag_id, run_id, "count", try_number)
    return [int(found[1]) for line in log if (found := re.search(r"number (\d+)$", line))]


def test_a_long_step_holds_no_slot_and_its_log_has_every_line_once(
    airflow: AirflowClient, cluster: Any
) -> None:
    run_id = airflow.trigger("counting")
    wait_until(lambda: state(airflow, "counting", run_id) == "deferred", "it is deferred")
    seen = len(numbers(airflow, "counting", run_id))
    wait_until(
        lambda: len(numbers(airflow, "counting", run_id)) > seen + 20, "lines come meanwhile"
    )
    assert state(airflow, "counting", run_id) == "deferred"
    wait_until(
        lambda: airflow.get_run("counting", run_id)["state"] in ("success", "failed"), "its end"
    )
    log = "\n".join(airflow.get_log("counting", run_id, "count", 1))
    assert state(airflow, "counting", run_id) == "success", log
    assert numbers(airflow, "counting", run_id) == list(range(200)), log
    made = airflow.find_xcom("counting", run_id, "count", "out")
    assert Path(made["uri"].removeprefix("file://")).read_text() == "counted 200"
    assert make_api(cluster.kubeconfig).list_namespaced_pod(cluster.namespace).items == []
