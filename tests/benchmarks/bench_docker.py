"""What a step in a container costs on a real Airflow, against Airflow's own DockerOperator with the same image.

One after the other, in a chain: a fan-out of containers measures the Docker daemon. Each has a DAG file of its own, as
its users have: every task imports what its file does.

Run: ``python tests/benchmarks/bench_docker.py [--rounds 5] [--json]``; needs a Docker daemon with the image
``python:3.11-slim`` (``.ci/python-image.sh`` makes one).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bench_airflow import CHAIN, measure_shape, report, show
from run import LEFT_OUT

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient

IMAGE = "python:3.11-slim"
LIMIT = 1.15
OPERATORS = '''
"""DockerOperators in a chain, for airflow."""
from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk import DAG

with DAG("docker_chain", schedule=None, default_args={"weight_rule": "absolute"}):
    before = None
    for number in range(CHAIN):
        task = DockerOperator(
            task_id=f"step_{number}", image=IMAGE, command=COMMAND, auto_remove="force"
        )
        before and before >> task
        before = task
'''
STEPS = '''
"""Steps in a chain, for airflow."""
from airflow_mlpipelines import CommandStep, DockerCompute, Pipeline, Workspace

compute = DockerCompute("docker", image=IMAGE)
chain = [
    CommandStep(COMMAND, name=f"step_{number}", version=f"d{number}", compute_target=compute)
    for number in range(CHAIN)
]
for earlier, later in zip(chain, chain[1:]):
    later.run_after(earlier)
step_chain = Pipeline(Workspace.from_config(), chain, name="step_chain").to_dag()
'''


def main() -> int:
    """Print the figure; return 1 if it is over its limit, :data:`LEFT_OUT` if nothing is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not has_image():
        report(f"left out: no Docker daemon with the image {IMAGE}")
        return LEFT_OUT
    with tempfile.TemporaryDirectory(prefix="mlpipelines-bench-") as folder:
        home = Path(folder)
        (home / "dags").mkdir()
        values = (CHAIN, IMAGE, ["sh", "-c", "echo hello"])
        head = f"CHAIN, IMAGE, COMMAND = {values!r}\n"
        for name, text in (("operators", OPERATORS), ("steps", STEPS)):
            (home / "dags" / f"{name}.py").write_text(head + text)
        with AirflowStack(home, home / "dags") as stack:
            client = AirflowClient(stack.url, username=stack.username, password=stack.password)
            result = {
                "benchmark": f"a step in a container, chain of {CHAIN}",
                "baseline": "DockerOperator with the same image and command",
                **measure_shape(client, "docker_chain", "step_chain", CHAIN, args.rounds),
                "limit": LIMIT,
            }
    print(json.dumps(result) if args.json else show(result), flush=True)
    return 0 if result["ratio"] <= LIMIT else 1


def has_image() -> bool:
    """Return whether there is a daemon that has the image."""
    try:
        found = subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True)
    except OSError:
        return False
    return found.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
