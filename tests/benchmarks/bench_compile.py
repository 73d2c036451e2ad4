"""Parsing and compiling a pipeline of many steps, against the same DAG of bare operators by hand.

Run: ``python tests/benchmarks/bench_compile.py [--steps 1000] [--json]``
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_RATIO = 1.5


def build_pipeline(steps: int, directory: str) -> object:
    """Return the DAG of a pipeline in layers of ten, every step with two producers before it."""
    from airflow_mlpipelines import CommandStep, Pipeline, PipelineData, Workspace

    workspace = Workspace.from_config()
    made: list[PipelineData] = []
    pipeline_steps = []
    for number in range(steps):
        output = PipelineData(f"out_{number}")
        inputs = [made[index] for index in upstream_of(number)]
        pipeline_steps.append(
            CommandStep(
                ["cp", *inputs, output],
                name=f"step_{number}",
                inputs=inputs,
                outputs=[output],
                source_directory=directory,
                compute_target="local",
            )
        )
        made.append(output)
    return Pipeline(workspace, pipeline_steps, name="benchmark").to_dag(dag_id="benchmark")


def build_by_hand(steps: int) -> object:
    """Return the same DAG of BashOperators: the same edges, trigger rules and weights."""
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG

    with DAG("by_hand", schedule=None) as dag:
        first = BashOperator(task_id="first", bash_command="true", weight_rule="absolute")
        tasks: list[BashOperator] = []
        for number in range(steps):
            task = BashOperator(
                task_id=f"step_{number}",
                bash_command="cp in out",
                weight_rule="absolute",
                trigger_rule="none_failed",
            )
            task.set_upstream([tasks[index] for index in upstream_of(number)] or [first])
            tasks.append(task)
    return dag


def measure(build: Callable[[], object]) -> float:
    """Return the seconds that building takes, without the garbage of what was built before."""
    gc.collect()
    started = time.perf_counter()
    build()
    return time.perf_counter() - started


def upstream_of(number: int) -> list[int]:
    """Return the two steps of the layer before, by number."""
    return (
        sorted({number - 10, number - 10 - number % 10 + (number + 3) % 10}) if number >= 10 else []
    )


def main() -> int:
    """Print the figures; return 1 if compiling costs more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["AIRFLOW_HOME"] = home
        os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
        (Path(home) / "run.sh").write_text("true\n")
        pairs = [
            (
                measure(lambda: build_by_hand(args.steps)),
                measure(lambda: build_pipeline(args.steps, home)),
            )
            for _ in range(args.rounds + 1)
        ]
    hand, ours = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    result = {
        "benchmark": f"parse and compile {args.steps} steps",
        "baseline": "the same DAG of BashOperators by hand",
        "baseline_s": round(hand, 4),
        "pipeline_s": round(ours, 4),
        "ratio": round(ours / hand, 2),
        "limit": LIMIT_RATIO,
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0 if ours / hand <= LIMIT_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
