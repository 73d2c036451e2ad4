"""docker-compose.yml with all of its services: a pipeline over REST, in containers, on S3, through a lost worker."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.docker.cli import docker_cli

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.compose.deployment import Deployment

pytestmark = [pytest.mark.docker, pytest.mark.stack]

# Few data make quick models: January is trained on, February tested.
_PARAMETERS = {"test_month": 2}
_OUTPUTS = {
    "ingest": "raw",
    "clean": "clean_flights",
    "features": "table",
    "train_linear": "linear",
    "train_boosted": "boosted",
    "evaluate": "choice",
    "report": "report",
}
_RESULTS = ("evaluate", "report")
_AT_WORK = ("train_linear", "train_boosted")  # when the worker was lost
_SECONDS = 600.0


def wait_until(
    deployment: Deployment, condition: Callable[[], Any], what: str, *, poll: float = 0.5
) -> Any:
    """Return the condition's first true value; fail with the services' logs if there is none."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(poll)
    raise AssertionError(f"waited {_SECONDS:g} s in vain until {what}\n{deployment.logs()}")


def start_run(deployment: Deployment, dag_id: str, conf: dict[str, Any] | None = None) -> str:
    """Trigger a run over REST and return its id."""
    airflow = deployment.airflow
    wait_until(deployment, lambda: airflow.find_dag(dag_id), f"DAG {dag_id} is known")
    airflow.unpause(dag_id)
    return airflow.trigger(dag_id, conf)


def finish(deployment: Deployment, dag_id: str, run_id: str) -> dict[str, dict[str, Any]]:
    """Return the run's task instances once it is over; it has to have succeeded."""
    airflow = deployment.airflow
    state = wait_until(
        deployment,
        lambda: (
            (found := airflow.get_run(dag_id, run_id)["state"]) in ("success", "failed") and found
        ),
        f"run {run_id} is over",
    )
    tasks = {task["task_id"]: task for task in airflow.list_task_instances(dag_id, run_id)}
    assert state == "success", (
        {name: task["state"] for name, task in tasks.items()},
        deployment.logs(),
    )
    return tasks


def read_artifacts(deployment: Deployment, run_id: str) -> dict[str, dict[str, Any]]:
    """Return what the run says of each step's output."""
    return {
        task_id: deployment.airflow.find_xcom("flights", run_id, task_id, output)
        for task_id, output in _OUTPUTS.items()
    }


def lose_worker(deployment: Deployment, run_id: str, task_id: str) -> tuple[str, str]:
    """Kill the worker of a step while its program is at work; return its host name and the container's name.

    The program is held still meanwhile, so that it can't be over before its worker is gone.
    """
    container = wait_until(
        deployment, lambda: deployment.find_step(task_id), f"step {task_id} runs", poll=0.05
    )
    docker_cli("pause", container)
    tasks = deployment.airflow.list_task_instances("flights", run_id)
    worker = next(task["hostname"] for task in tasks if task["task_id"] == task_id)
    assert docker_cli("kill", worker) == worker
    docker_cli("unpause", container)
    return worker, docker_cli("inspect", "--format", "{{.Name}}", container).lstrip("/")


def test_a_pipeline_survives_the_loss_of_a_worker(deployment: Deployment) -> None:
    started = subprocess.Popen(
        ["docker", "events", "--filter", "event=create", "--format", "{{.Actor.Attributes.name}}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        disturbed = start_run(deployment, "flights", _PARAMETERS)
        lost, container = lose_worker(deployment, disturbed, "train_boosted")
        tasks = finish(deployment, "flights", disturbed)
    finally:
        started.terminate()
        created, _ = started.communicate()

    boosted = tasks["train_boosted"]
    assert boosted["try_number"] > 1
    assert boosted["hostname"] != lost
    assert created.split().count(container) == 1  # the retry has found it, and made no other
    workers = {container["Config"]["Hostname"] for container in deployment.containers("worker")}
    used = {lost} | {task["hostname"] for task in tasks.values() if task["hostname"]}
    assert len(workers) == 2
    assert used == workers

    again = start_run(deployment, "flights", _PARAMETERS)
    finish(deployment, "flights", again)
    plan = deployment.airflow.find_xcom("flights", again, "cache_sensor", "plan")
    assert {step["decision"] for step in plan["steps"].values()} == {"reuse"}
    made = read_artifacts(deployment, disturbed)
    reused = read_artifacts(deployment, again)
    for task_id in _RESULTS:  # of what is neither made nor a result, a run says nothing
        assert reused[task_id] == made[task_id]

    undisturbed = start_run(
        deployment, "flights", {**_PARAMETERS, "regenerate_outputs": [*_AT_WORK, *_RESULTS]}
    )
    finish(deployment, "flights", undisturbed)
    compared = read_artifacts(deployment, undisturbed)
    for task_id in (*_AT_WORK, *_RESULTS):
        assert compared[task_id]["digest"] == made[task_id]["digest"], task_id
        record = deployment.airflow.find_xcom("flights", undisturbed, task_id, "step_run")
        assert record["state"] == "ran"

    address = made["report"]["uri"]
    assert address.startswith("s3://mlpipelines/workspaceblobstore/")
    assert deployment.s3.find(address.removeprefix("s3://"))
    assert not docker_cli("ps", "-aq", "--filter", f"network={deployment.steps_network}", "--filter",
                          "label=airflow-mlpipelines.step_run")  # fmt: skip


def test_mlflow_gets_what_a_step_tracks_and_the_step_reaches_nothing_else(
    deployment: Deployment,
) -> None:
    finish(deployment, "tracked", start_run(deployment, "tracked"))

    with httpx.Client(base_url=f"http://127.0.0.1:{deployment.settings['MLFLOW_PORT']}") as mlflow:
        reply = mlflow.post("/api/2.0/mlflow/runs/search", json={"experiment_ids": ["0"]})
    data = reply.raise_for_status().json()["runs"][0]["data"]
    assert [(metric["key"], metric["value"]) for metric in data["metrics"]] == [("auc", 0.75)]
    assert data["params"] == [{"key": "colour", "value": "blue"}]
    greeting = [path for path in deployment.s3.find("mlflow") if path.endswith("/greeting.txt")]
    assert deployment.s3.cat_file(*greeting) == b"hello"


def test_every_service_is_healthy(deployment: Deployment) -> None:
    """The last one: a worker's first check comes a minute after its start."""

    def look() -> bool:
        health = {
            container["Config"]["Labels"]["com.docker.compose.service"]: state["Health"]["Status"]
            for container in deployment.containers()
            if (state := container["State"])["Status"] != "exited"
        }
        return len(health) == 9 and set(health.values()) == {"healthy"}

    wait_until(deployment, look, "all services are healthy")
