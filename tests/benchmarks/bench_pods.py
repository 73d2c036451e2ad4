"""A hundred pods at once, on a real Airflow with 32 worker slots: steps against deferrable KubernetesPodOperators.

Every pod waits until all of them run: so none may hold a worker's slot for long. The cluster is a node that is started
here (``tests/cluster``), and the figure is the time from the run's start to its end. Each has a DAG file of its own, as
its users have: every task imports what its file does. What this package loads into Airflow's components before they fork
tasks is there for both. Both have retries: where a scheduler needs ten seconds to see that a task was deferred, and its
trigger calls for it sooner, Airflow fails it ("state mismatch").

Run: ``python tests/benchmarks/bench_pods.py [--pods 100] [--json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench_airflow import report, run, show
from bench_kubernetes import IMAGE
from run import LEFT_OUT

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient
from tests.cluster.sharing import use_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 1.25
LONGEST = 1500
OPERATORS = '''
"""Many operators beside each other, for airflow."""
from datetime import timedelta

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG

patient = {"weight_rule": "absolute", "retries": 5, "retry_delay": timedelta(seconds=1)}
with DAG("pod_fan", schedule=None, max_active_tasks=PODS, default_args=patient):
    for number in range(PODS):
        KubernetesPodOperator(
            task_id=f"step_{number}",
            name=f"step-{number}",
            namespace="default",
            config_file=KUBECONFIG,
            image=IMAGE,
            cmds=command(number),
            on_finish_action="delete_pod",
            deferrable=True,
            startup_timeout_seconds=1800,
        )
'''
STEPS = '''
"""Many steps beside each other, for airflow."""
from airflow_mlpipelines import CommandStep, KubernetesCompute, Pipeline, Workspace

compute = KubernetesCompute("pods", image=IMAGE, helper_image=IMAGE, defer_after_seconds=5)
fan = [
    CommandStep(
        command(number), name=f"step_{number}", allow_reuse=False, compute_target=compute, retries=5,
        retry_delay=1,
    )
    for number in range(PODS)
]
step_fan = Pipeline(Workspace.from_config(), fan, name="step_fan").to_dag(max_active_tasks=PODS)
'''
COMMAND = """
def command(number):
    return ["sh", "-c", f"until wget -q -O /dev/null {GATE}/{number}; do sleep 3; done"]
"""


class Gate:
    """Lets the pods go on once all of them have asked."""

    def __init__(self, pods: int) -> None:
        self._pods = pods
        self._began = time.monotonic()
        self._asked: set[str] = set()
        self.opened_after: float | None = None

    def close(self) -> None:
        """Begin anew."""
        self._asked.clear()
        self.opened_after = None
        self._began = time.monotonic()

    def ask(self, pod: str) -> bool:
        """Return whether the pod may go on."""
        self._asked.add(pod)
        if len(self._asked) == self._pods and self.opened_after is None:
            self.opened_after = time.monotonic() - self._began
        return self.opened_after is not None

    @contextmanager
    def served(self, address: str) -> Iterator[str]:
        """Answer the pods at an address of this machine, and give the URL."""
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if gate.ask(self.path) else 503)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer((address, 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{address}:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


def main() -> int:
    """Print the figure; return 1 if it is over its limit, :data:`LEFT_OUT` if nothing is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=100)
    parser.add_argument("--no-baseline", action="store_true", help="only show that it works")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, help="of no use here: one round takes minutes")
    args = parser.parse_args()
    os.environ.pop("KUBECONFIG", None)
    try:
        with use_cluster(f"bench-{os.getpid()}") as access:
            if access.host_address is None:
                report("left out: it is not known where pods reach this machine")
                return LEFT_OUT
            result = measure(
                access.kubeconfig, access.host_address, args.pods, baseline=not args.no_baseline
            )
    except (pytest.skip.Exception, pytest.fail.Exception) as reason:
        report(f"left out: {reason}")
        return LEFT_OUT
    print(json.dumps(result) if args.json else show(result), flush=True)
    return 0 if args.no_baseline or float(result["ratio"]) <= LIMIT else 1


def measure(
    kubeconfig: Path, address: str, pods: int, *, baseline: bool = True
) -> dict[str, float | str]:
    """Return the figures of steps and operators on the cluster."""
    os.environ["KUBECONFIG"] = str(kubeconfig)  # for the workers, which the stack starts
    gate = Gate(pods)
    with (
        tempfile.TemporaryDirectory(prefix="mlpipelines-bench-") as folder,
        gate.served(address) as url,
    ):
        home = Path(folder)
        values = (pods, IMAGE, url, str(kubeconfig))
        head = f"PODS, IMAGE, GATE, KUBECONFIG = {values!r}\n"
        figures: dict[str, float | str] = {
            "benchmark": f"{pods} pods at once",
            "baseline": "deferrable KubernetesPodOperator with the same image and command",
        }
        (home / "dags").mkdir()
        for name, text in (("operators", OPERATORS), ("steps", STEPS)):
            (home / "dags" / f"{name}.py").write_text(head + COMMAND + text)
        seconds = {}
        measured = [("baseline", "pod_fan")] if baseline else []
        with AirflowStack(home, home / "dags") as stack:
            client = AirflowClient(stack.url, username=stack.username, password=stack.password)
            for name, dag_id in (*measured, ("steps", "step_fan")):
                gate.close()
                seconds[name] = run(client, dag_id, seconds=LONGEST)[1]
                figures[f"{name}_all_running_after_s"] = round(gate.opened_after or 0.0, 1)
                figures[f"{name}_s"] = round(seconds[name], 1)
    if not baseline:
        return figures
    return {**figures, "ratio": round(seconds["steps"] / seconds["baseline"], 2), "limit": LIMIT}


if __name__ == "__main__":
    raise SystemExit(main())
