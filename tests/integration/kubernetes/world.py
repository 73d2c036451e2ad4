"""A real Airflow with all of its processes beside a real cluster, and runs on it, over REST alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.integration.kubernetes.steps import make_api, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_mlpipelines.cli.stack import AirflowStack
    from airflow_mlpipelines.submission.rest import AirflowClient


@dataclass
class World:
    """A running Airflow, and the cluster that its steps run on."""

    stack: AirflowStack
    client: AirflowClient
    cluster: Any

    def start(self, dag_id: str) -> Run:
        return Run(self, dag_id, self.client.trigger(dag_id))


@dataclass
class Run:
    """One run of a pipeline whose one step is ``count``."""

    world: World
    dag_id: str
    run_id: str

    @property
    def task(self) -> Any:
        tasks = self.world.client.list_task_instances(self.dag_id, self.run_id)
        return next(task for task in tasks if task["task_id"] == "count")

    @property
    def state(self) -> Any:
        return self.task["state"]

    def log(self, try_number: int = 1) -> str:
        return "\n".join(self.world.client.get_log(self.dag_id, self.run_id, "count", try_number))

    def numbers(self, try_number: int = 1) -> list[int]:
        return [int(found) for found in re.findall(r"(?m)number (\d+)$", self.log(try_number))]

    def error(self) -> str:
        """Return the exception that the task ended with, as its log has it."""
        path = f"/api/v2/dags/{self.dag_id}/dagRuns/{self.run_id}/taskInstances/count/logs/1"
        found = self.world.client._send("GET", path).json()["content"]
        return " ".join(str(line["error_detail"]) for line in found if line.get("error_detail"))

    def has_left_nothing(self) -> bool:
        """Wait until what was told to go is gone."""
        self.wait_until(lambda run: not run.pods(), "its pods and Secrets are gone")
        return True

    def pods(self) -> list[Any]:
        selector = f"airflow-mlpipelines.dag_id={self.dag_id}"
        api, namespace = make_api(self.world.cluster.kubeconfig), self.world.cluster.namespace
        found = api.list_namespaced_pod(namespace, label_selector=selector).items
        return found + api.list_namespaced_secret(namespace, label_selector=selector).items

    def pod(self) -> Any:
        return next(iter(self.pods()), None)

    def wait_until(self, condition: Callable[[Run], Any], what: str) -> Any:
        try:
            return wait_until(lambda: condition(self), what, seconds=150)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.state}: {self.log()}") from None

    def wait_until_deferred(self, *, numbers: int = 1) -> None:
        self.wait_until(lambda run: run.state == "deferred", "it is deferred")
        self.wait_until(lambda run: len(run.numbers()) >= numbers, "lines come meanwhile")

    def finish(self) -> str:
        ended = ("success", "failed", "skipped", "upstream_failed")
        return str(self.wait_until(lambda run: run.state in ended and run.state, "its end"))
