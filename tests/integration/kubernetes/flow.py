"""A small pipeline as a team has it: three scripts on a bucket, in pods with the agent, followed over REST."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.integration.kubernetes.s3 import REGION
from tests.integration.kubernetes.steps import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.submission.rest import AirflowClient
    from tests.integration.kubernetes.s3 import Lake

NAME = "flow"
STEPS = ("split", "total", "report")
TASKS = ("cache_sensor", *STEPS, "finish")
WORKSPACE = """
name: flow
datastores:
  lake: {{url: "{url}", conn_id: lake}}
default_compute: cluster
computes:
  cluster:
    type: kubernetes
    namespace: {namespace}
    in_cluster: false
    image: "{image}"
    agent_image: "{agent_image}"
"""
DAG = """
# Numbers, split and counted, for airflow. A dag.
from airflow_mlpipelines import DataReference, Pipeline, PipelineData, PythonScriptStep, Workspace

ws = Workspace.from_config()
raw = DataReference(ws.default_datastore, "raw", "raw/numbers.txt", pin="version")
parts, total = PipelineData("parts", is_directory=True), PipelineData("total")
report = PipelineData("report", pipeline_output_name="report")

def step(name, inputs, output):
    return PythonScriptStep(
        name + ".py", name=name, arguments=[*inputs, output], inputs=inputs, outputs=[output], source_directory="code"
    )

steps = [step("split", [raw], parts), step("total", [parts], total), step("report", [parts, total], report)]
dag = Pipeline(ws, steps, name="flow").to_dag()
"""
SCRIPTS = {
    "split": """
import pathlib, sys
raw, parts = map(pathlib.Path, sys.argv[1:])
numbers = [int(word) for word in raw.read_text().split()]
parts.mkdir()
for rest, name in enumerate(("even", "odd")):
    (parts / (name + ".txt")).write_text(" ".join(str(n) for n in numbers if n % 2 == rest))
""",
    "total": """
import pathlib, sys
from airflow_mlpipelines import Run
parts, total = map(pathlib.Path, sys.argv[1:])
found = sum(int(word) for part in parts.iterdir() for word in part.read_text().split())
Run.get_context(allow_offline=False).log("total", found)
total.write_text(str(found))
""",
    "report": """
import pathlib, sys
parts, total, report = map(pathlib.Path, sys.argv[1:])
report.write_text(f"{total.read_text()} in {len(list(parts.iterdir()))} parts")
""",
}


def write(folder: Path, lake: Lake, *, namespace: str, image: str, agent_image: str) -> None:
    """Write the pipeline with its workspace into a folder of DAG files."""
    (folder / "code").mkdir(parents=True)
    workspace = WORKSPACE.format(
        url=lake.root, namespace=namespace, image=image, agent_image=agent_image
    )
    (folder / "mlpipelines.yaml").write_text(workspace)
    (folder / "flow.py").write_text(DAG)
    for name, text in SCRIPTS.items():
        (folder / "code" / f"{name}.py").write_text(text)


def connection(lake: Lake) -> str:
    """Return the Airflow connection to the bucket."""
    extra = {"endpoint_url": lake.url, "region_name": REGION}
    return json.dumps(
        {"conn_type": "aws", "login": lake.key, "password": lake.secret, "extra": extra}
    )


@dataclass
class FlowRun:
    """One run of the pipeline, over."""

    client: AirflowClient
    run_id: str

    @property
    def states(self) -> dict[str, Any]:
        """How each task has ended."""
        tasks = self.client.list_task_instances(NAME, self.run_id)
        return {task["task_id"]: task["state"] for task in tasks}

    def result(self, step: str, output: str) -> Any:
        """What the run says of an output."""
        return self.client.find_xcom(NAME, self.run_id, step, output)

    def metrics(self, step: str) -> Any:
        return self.client.find_xcom(NAME, self.run_id, step, "metrics")

    def plan(self) -> Any:
        return self.client.find_xcom(NAME, self.run_id, "cache_sensor", "plan")

    def logs(self) -> str:
        return "\n".join(
            line for task in TASKS for line in self.client.get_log(NAME, self.run_id, task, 1)
        )


def run(client: AirflowClient) -> FlowRun:
    """Trigger a run, and follow it to its end, which has to be a good one."""
    made = FlowRun(client, client.trigger(NAME))
    ended = ("success", "failed")
    state = wait_until(
        lambda: (found := client.get_run(NAME, made.run_id)["state"]) in ended and found,
        "the run is over",
        seconds=400,
    )
    assert state == "success", (made.states, made.logs())
    return made
