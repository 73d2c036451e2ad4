"""What a step costs on a real Airflow, against Airflow's own operators in the same Airflow.

(a) A step on LocalCompute against a BashOperator that runs the same command, in a chain and in a fan-out.
(b) A pipeline of 1000 steps, run again with nothing changed, against a DAG of one PythonOperator and 1000
    tasks that it skips: how long the run takes, and how many task processes it starts.

Each side has DAG files of its own, as its users have: every task imports what its file does.

Run: ``python tests/benchmarks/bench_airflow.py [--steps 1000] [--rounds 5] [--json]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient

LIMIT_STEP = 1.25
LIMIT_REUSE = 1.5
CHAIN, FAN = 20, 60
MAKE_ALL = "--make-all"
SETTINGS = {"AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.05"}
"""A sleeping scheduler rounds the time of a task up to its own rhythm, and hides or doubles a difference."""
BASH = '''
"""BashOperators, for airflow."""
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG("bash_chain", schedule=None, default_args={"weight_rule": "absolute"}):
    before = BashOperator(task_id="first", bash_command="true")
    for number in range(CHAIN):
        task = BashOperator(task_id=f"step_{number}", bash_command="echo hello")
        before >> task
        before = task
with DAG("bash_fan", schedule=None, default_args={"weight_rule": "absolute"}):
    first = BashOperator(task_id="first", bash_command="true")
    last = BashOperator(task_id="last", bash_command="true")
    for number in range(FAN):
        first >> BashOperator(task_id=f"step_{number}", bash_command="echo hello") >> last
'''
OURS = '''
"""Steps with the same command, for airflow."""
from airflow_mlpipelines import CommandStep, Pipeline, Workspace

ws = Workspace.from_config()
COMMAND = ["sh", "-c", "echo hello"]
chain = [CommandStep(COMMAND, name=f"step_{number}", version=f"c{number}") for number in range(CHAIN)]
for earlier, later in zip(chain, chain[1:]):
    later.run_after(earlier)
step_chain = Pipeline(ws, chain, name="step_chain").to_dag()
step_fan = Pipeline(
    ws, [CommandStep(COMMAND, name=f"step_{n}", version=f"f{n}") for n in range(FAN)], name="step_fan"
).to_dag()
'''
UPSTREAM_OF = """
def upstream_of(number):
    if number < 10:
        return []
    return sorted({number - 10, number - 10 - number % 10 + (number + 3) % 10})
"""
SKIPPED = '''
"""Tasks that another one skips, for airflow."""
from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG
from airflow.sdk.exceptions import DownstreamTasksSkipped

def skip_all():
    raise DownstreamTasksSkipped(tasks=[f"step_{number}" for number in range(STEPS)])

with DAG("skip_by_hand", schedule=None, default_args={"weight_rule": "absolute"}):
    first = PythonOperator(task_id="first", python_callable=skip_all)
    tasks = []
    for number in range(STEPS):
        task = BashOperator(task_id=f"step_{number}", bash_command="true", trigger_rule="none_failed")
        (([tasks[index] for index in upstream_of(number)]) or first) >> task
        tasks.append(task)
'''
REUSED = '''
"""A pipeline that is reused, for airflow."""
from airflow_mlpipelines import CommandStep, Pipeline, PipelineData, Workspace

made, many = [], []
for number in range(STEPS):
    out = PipelineData(f"out_{number}")
    inputs = [made[index] for index in upstream_of(number)]
    many.append(
        CommandStep(
            ["sh", "-c", f"echo {number} > {out}"], name=f"step_{number}", inputs=inputs, outputs=[out]
        )
    )
    made.append(out)
reuse = Pipeline(Workspace.from_config(), many, name="reuse").to_dag(max_active_tasks=32)
'''


def main() -> int:
    """Print the figures; return 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="0 leaves the second part out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlpipelines-bench-") as folder:
        home = Path(folder)
        dags = home / "dags"
        dags.mkdir()
        for name, text in (("bash", BASH), ("ours", OURS)):
            (dags / f"{name}.py").write_text(f"CHAIN, FAN = {CHAIN}, {FAN}\n{text}")
        with AirflowStack(home, dags, settings=SETTINGS) as stack:
            client = AirflowClient(stack.url, username=stack.username, password=stack.password)
            results = measure_steps(client, args.rounds)
            if args.steps:
                # Only now: the dag-processor reads files of so many tasks again and again.
                for name, text in (("skipped", SKIPPED), ("reused", REUSED)):
                    head = f"STEPS = {args.steps}\n{UPSTREAM_OF}"
                    (dags / f"{name}.py").write_text(head + text)
                results.append(measure_reuse(stack, client, args.steps, args.rounds))
    for result in results:
        print(json.dumps(result) if args.json else show(result), flush=True)
    return 0 if all(result["ratio"] <= result["limit"] for result in results) else 1


def measure_steps(client: AirflowClient, rounds: int) -> list[dict[str, object]]:
    """Return the time of a step against that of a BashOperator, in a chain and in a fan-out."""
    return [
        {
            "benchmark": f"a step on LocalCompute, {shape} of {count}",
            "baseline": "BashOperator with the same command",
            **measure_shape(client, f"bash_{shape}", f"step_{shape}", count, rounds),
            "limit": LIMIT_STEP,
        }
        for shape, count in (("chain", CHAIN), ("fan", FAN))
    ]


def measure_shape(
    client: AirflowClient, baseline: str, pipeline: str, count: int, rounds: int
) -> dict[str, float]:
    """Return the seconds per task of two DAGs with ``count`` tasks, by turns, and their ratio."""
    for dag_id in (baseline, pipeline):
        run(client, dag_id)  # the first run after a start imports more
    pairs = [
        (
            tasks_seconds(client, baseline, {}),
            tasks_seconds(client, pipeline, {"regenerate_outputs": ["all"]}),
        )
        for _ in range(rounds)
    ]
    theirs, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "baseline_s_per_task": round(theirs / count, 4),
        "step_s_per_task": round(ours / count, 4),
        "ratio": round(ours / theirs, 2),
    }


def make_all_steps() -> None:
    """Make the outputs of the pipeline ``reuse``, without a scheduler: a 1000 deep tasks take it long."""
    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.cli.files import load_pipeline
    from airflow_mlpipelines.compute.local import LocalLauncher
    from airflow_mlpipelines.execution.handles import FileHandle
    from airflow_mlpipelines.execution.identity import TaskIdentity
    from airflow_mlpipelines.execution.planning import plan_run
    from airflow_mlpipelines.execution.services import Services
    from airflow_mlpipelines.execution.step import StepRunner
    from airflow_mlpipelines.operators.connections import metadata_url, open_blobs, open_stores

    graph = load_pipeline(Path(sys.argv[2]), "reuse").graph
    index, stores = MetadataIndex(metadata_url()), open_stores(graph)
    plan = plan_run(graph, parameters={}, regenerate=(), index=index, stores=stores)
    made = {}
    for step in graph.steps:
        compute = graph.computes[step.compute]
        identity = TaskIdentity("reuse", "made_before", step.id, -1, 0, 1)
        runner = StepRunner(
            step,
            graph,
            identity=identity,
            plan=plan,
            inputs={item.name: made[item.source.step][item.source.output] for item in step.inputs},
            services=Services(
                index=index,
                stores=stores,
                launcher=LocalLauncher(compute),
                handle=FileHandle(Path(sys.argv[2]).with_name(f"{step.id}.json")),
                emit=lambda _: None,
                blobs=open_blobs(),
            ),
        )
        made[step.id] = runner.run().outputs


def measure_reuse(
    stack: AirflowStack, client: AirflowClient, steps: int, rounds: int
) -> dict[str, object]:
    """Return the time of a run that reuses everything against that of tasks skipped by hand."""
    report(f"Making {steps} steps for the first time")
    subprocess.run(
        [sys.executable, __file__, MAKE_ALL, str(stack.dags_folder / "reused.py")],
        env=stack.environment,
        check=True,
    )
    run(client, "reuse")
    run(client, "skip_by_hand")
    pairs, processes = [], 0
    for _ in range(rounds):
        _, by_hand = run(client, "skip_by_hand")
        run_id, ours = run(client, "reuse")
        started = [
            task["task_id"] for task in client.list_task_instances("reuse", run_id) if task["pid"]
        ]
        processes = len(started)
        pairs.append((by_hand, ours))
    hand, reuse = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "benchmark": f"a run of {steps} unchanged steps",
        "baseline": f"one PythonOperator and {steps} tasks skipped by it",
        "baseline_s": round(hand, 2),
        "reuse_s": round(reuse, 2),
        "task_processes_for_the_decision": processes,
        "ratio": round(reuse / hand, 2),
        "limit": LIMIT_REUSE,
    }


def run(
    client: AirflowClient, dag_id: str, conf: dict[str, object] | None = None, seconds: float = 300
) -> tuple[str, float]:
    """Run a DAG; return the run's id and Airflow's own seconds from its start to its end."""
    deadline = time.monotonic() + seconds
    while client.find_dag(dag_id) is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"{dag_id} does not appear: {client.list_import_errors()}")
        time.sleep(0.5)
    client.unpause(dag_id)
    run_id = client.trigger(dag_id, conf or {})
    while True:
        found = client.get_run(dag_id, run_id)
        if found["state"] in ("success", "failed"):
            break
        if time.monotonic() > deadline:
            raise SystemExit(f"{dag_id} is not over after {seconds} s")
        time.sleep(0.3)
    if found["state"] != "success":
        raise SystemExit(f"{dag_id} failed")
    return run_id, parse(found["end_date"]) - parse(found["start_date"])


def tasks_seconds(client: AirflowClient, dag_id: str, conf: dict[str, object]) -> float:
    """Run a DAG; return the seconds from the start of its first step to the end of its last."""
    run_id, _ = run(client, dag_id, conf)
    tasks = [
        task
        for task in client.list_task_instances(dag_id, run_id)
        if task["task_id"].startswith("step_")
    ]
    return max(parse(task["end_date"]) for task in tasks) - min(
        parse(task["start_date"]) for task in tasks
    )


def parse(text: str) -> float:
    """Return a point in time as seconds."""
    return datetime.fromisoformat(text).timestamp()


def report(line: str) -> None:
    """Tell a person what goes on."""
    print(line, file=sys.stderr, flush=True)


def show(result: dict[str, object]) -> str:
    """Return a result for people."""
    return "\n".join(f"{key}: {value}" for key, value in result.items()) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == [MAKE_ALL]:
        make_all_steps()
        sys.exit()
    raise SystemExit(main())
