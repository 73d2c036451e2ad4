"""What a step in a pod costs on a real Airflow, against Airflow's own KubernetesPodOperator with the same image.

One after the other, in a chain: a fan-out of pods measures the node. The cluster is the one of ``KUBECONFIG``, or
kind's, or a node started here for as long as it takes (``tests/cluster``). Each has a DAG file of its own, as its users
have: every task imports what its file does.

Run: ``python tests/benchmarks/bench_kubernetes.py [--rounds 5] [--json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench_airflow import measure_shape, report, show
from run import LEFT_OUT

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient
from tests.cluster.sharing import use_cluster

IMAGE = "docker.io/library/busybox:1.36"
CHAIN = 8
LIMIT = 1.25
OPERATORS = '''
"""KubernetesPodOperators in a chain, for airflow."""
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG

with DAG("pod_chain", schedule=None, default_args={"weight_rule": "absolute"}):
    before = None
    for number in range(CHAIN):
        task = KubernetesPodOperator(
            task_id=f"step_{number}",
            name=f"step-{number}",
            namespace="default",
            config_file=KUBECONFIG,
            image=IMAGE,
            cmds=COMMAND,
            on_finish_action="delete_pod",
        )
        before and before >> task
        before = task
'''
STEPS = '''
"""Steps in a chain, for airflow."""
from airflow_mlpipelines import CommandStep, KubernetesCompute, Pipeline, Workspace

compute = KubernetesCompute("pods", image=IMAGE, helper_image=IMAGE)
chain = [
    CommandStep(COMMAND, name=f"step_{number}", version=f"k{number}", compute_target=compute)
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
    try:
        with use_cluster(f"bench-{os.getpid()}") as access:
            result = measure(access.kubeconfig, args.rounds)
    except (pytest.skip.Exception, pytest.fail.Exception) as reason:
        report(f"left out: {reason}")
        return LEFT_OUT
    print(json.dumps(result) if args.json else show(result), flush=True)
    return 0 if result["ratio"] <= LIMIT else 1


def measure(kubeconfig: Path, rounds: int) -> dict[str, object]:
    """Return the figures of steps and operators on the cluster that the file names."""
    os.environ["KUBECONFIG"] = str(kubeconfig)  # for the workers, which the stack starts
    with tempfile.TemporaryDirectory(prefix="mlpipelines-bench-") as folder:
        home = Path(folder)
        (home / "dags").mkdir()
        values = (CHAIN, IMAGE, str(kubeconfig), ["sh", "-c", "echo hello"])
        head = f"CHAIN, IMAGE, KUBECONFIG, COMMAND = {values!r}\n"
        for name, text in (("operators", OPERATORS), ("steps", STEPS)):
            (home / "dags" / f"{name}.py").write_text(head + text)
        with AirflowStack(home, home / "dags") as stack:
            client = AirflowClient(stack.url, username=stack.username, password=stack.password)
            return {
                "benchmark": f"a step in a pod, chain of {CHAIN}",
                "baseline": "KubernetesPodOperator with the same image and command",
                **measure_shape(client, "pod_chain", "step_chain", CHAIN, rounds),
                "limit": LIMIT,
            }


if __name__ == "__main__":
    raise SystemExit(main())
