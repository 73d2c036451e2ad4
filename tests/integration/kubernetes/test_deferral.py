"""Steps on a real cluster under a real Airflow with all of its processes, triggered and read back over REST."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.cli.stack import AirflowStack
from airflow_mlpipelines.submission.rest import AirflowClient
from tests.integration.kubernetes import flow
from tests.integration.kubernetes.rights import grant_rights
from tests.integration.kubernetes.s3 import Lake, serve_s3
from tests.integration.kubernetes.steps import IMAGE, make_api, wait_until
from tests.integration.kubernetes.test_kubernetes_agent import agent_image  # noqa: F401 - a fixture
from tests.integration.kubernetes.world import World
from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.s3,
    pytest.mark.stack,
    pytest.mark.timeout(900),
]

CANARY = "canary-4711"
DAG = """
# Steps in pods, for airflow to wait for. A dag.
from datetime import timedelta
from airflow_mlpipelines import CommandStep, KubernetesCompute, Pipeline, PipelineData, Resources, Workspace

ws = Workspace.from_config()
COUNT = '\\n'.join([
    "import sys, time",
    "for number in range(int(sys.argv[1])):",
    "    print('number', number, flush=True); time.sleep(0.1)",
    "time.sleep(2)",  # containerd 1.6 may drop what a program prints right before its end
    "open(sys.argv[2], 'w').write('counted ' + sys.argv[1])",
])

def pipeline(name, numbers, compute=None, step=None, **options):
    fields = dict(namespace={namespace!r}, image={image!r}, in_cluster=False, defer_after_seconds=2)
    out = PipelineData("out")
    command = CommandStep(
        ["python3", "-c", COUNT, str(numbers), out], name="count", outputs=[out], allow_reuse=False,
        compute_target=KubernetesCompute("cluster", **(fields | (compute or dict()))), **(step or dict()),
    )
    globals()[name] = Pipeline(ws, [command], name=name).to_dag(**options)

pipeline("counting", 200, step=dict(secrets=dict(PASSWORD="canary")))
pipeline("stopped", 100000, step=dict(secrets=dict(PASSWORD="canary")))
pipeline("cleared", 100001)
pipeline("too_long", 100002, dagrun_timeout=timedelta(seconds=45))
pipeline("expired", 100003, step=dict(timeout=8))
pipeline("taken", 60)
pipeline("orphaned", 300)
pipeline("crowded", 3, compute=dict(priority_class={namespace!r}))
pipeline("attended", 150, compute=dict(deferrable=False), step=dict(retries=1, retry_delay=1))
pipeline("lost", 60, compute=dict(deferrable=False), step=dict(secrets=dict(PASSWORD="canary")))
pipeline("unschedulable", 1, compute=dict(schedule_timeout_seconds=12, gpus=64), step=dict(resources=Resources(gpus=64)))
"""


@pytest.fixture(scope="module")
def lake(cluster: Any) -> Iterator[Lake]:
    with serve_s3(cluster.host_address) as lake:
        yield lake


@pytest.fixture(scope="module")
def world(cluster: Any, request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[World]:
    home = tmp_path_factory.mktemp("airflow")
    dags = home / "dags"
    dags.mkdir()
    (dags / "pods.py").write_text(DAG.format(namespace=cluster.namespace, image=IMAGE))
    dag_ids = re.findall(r'(?m)^pipeline\("(\w+)"', DAG)
    settings = {}
    if cluster.access.state is not None:  # of another one, neither node nor network is ours
        lake = request.getfixturevalue("lake")
        flow.write(
            dags / "flow",
            lake,
            namespace=cluster.namespace,
            image=cluster.access.pin_image(IMAGE),
            agent_image=request.getfixturevalue("agent_image"),
        )
        settings = {"AIRFLOW_CONN_LAKE": flow.connection(lake)}
        dag_ids.append(flow.NAME)
    account = grant_rights(cluster)[0]  # with no other rights than those that we say it takes
    account.write_kubeconfig(home / "kubeconfig")
    settings |= {
        "KUBECONFIG": str(home / "kubeconfig"),
        "AIRFLOW_CONN_CANARY": f"generic://:{CANARY}@",
        # So that a triggerer that was killed is missed soon.
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "8",
        # The same for a scheduler.
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "30",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
    }
    with AirflowStack(home, dags, settings=settings) as stack:
        client = AirflowClient(stack.url, username=stack.username, password=stack.password)
        for dag_id in dag_ids:
            wait_until(
                lambda dag_id=dag_id: client.find_dag(dag_id) or client.list_import_errors(),
                f"DAG {dag_id} is there",
            )
            assert client.list_import_errors() == []
            client.unpause(dag_id)
        yield World(stack, client, cluster)


def test_a_long_step_holds_no_slot_and_its_log_has_every_line_once(world: World) -> None:
    run = world.start("counting")
    run.wait_until_deferred(numbers=30)
    assert run.state == "deferred"
    assert run.finish() == "success", run.log()
    assert run.numbers() == list(range(200)), run.log()
    assert CANARY not in run.log()
    made = world.client.find_xcom("counting", run.run_id, "count", "out")
    assert Path(made["uri"].removeprefix("file://")).read_text() == "counted 200"
    assert run.has_left_nothing()
    assert list((world.stack.home / "mlpipelines" / "work").glob("*")) == []


def test_whatever_ends_a_deferred_task_ends_its_pod(world: World) -> None:
    stopped, cleared, too_long = (
        world.start(dag_id) for dag_id in ("stopped", "cleared", "too_long")
    )
    stopped.wait_until_deferred()
    assert len(stopped.pods()) == 2  # and its Secret
    world.client._send(
        "PATCH",
        f"/api/v2/dags/stopped/dagRuns/{stopped.run_id}/taskInstances/count",
        json={"new_state": "failed"},
    ).raise_for_status()
    cleared.wait_until_deferred()
    # On a slow machine, its run's time is up before it is deferred.
    too_long.wait_until(
        lambda run: run.state not in (None, "scheduled", "queued", "running"), "it waits"
    )
    first = cleared.pod().metadata.uid
    world.client.clear("cleared", cleared.run_id, ["count"])

    assert stopped.has_left_nothing()
    cleared.wait_until(
        lambda run: (
            [pod.metadata.uid for pod in run.pods()] not in ([], [first])
            and first not in [pod.metadata.uid for pod in run.pods()]
        ),
        "only a new pod is there",
    )
    assert too_long.has_left_nothing()
    cleared.wait_until(lambda run: run.numbers(2), "the new pod is left to itself")
    world.client.cancel("cleared", cleared.run_id)
    assert cleared.has_left_nothing()


def test_a_pod_taken_away_is_launched_again_and_costs_no_retry(world: World) -> None:
    run = world.start("taken")
    run.wait_until_deferred()
    api = make_api(world.cluster.kubeconfig)
    api.delete_namespaced_pod(run.pod().metadata.name, world.cluster.namespace)
    assert run.finish() == "success", run.log()
    assert run.task["try_number"] == 1
    assert re.search(r"took its pod away \(.*\); launched again \(1 of 5\)", run.log())
    assert run.numbers()[-60:] == list(range(60)), run.log()
    assert run.numbers().count(0) == 2  # what the first pod has printed is still there
    assert run.has_left_nothing()


def test_a_step_whose_time_is_up_or_that_fits_nowhere_is_told_while_deferred(world: World) -> None:
    expired, unschedulable = (world.start(dag_id) for dag_id in ("expired", "unschedulable"))
    assert unschedulable.finish() == "failed"
    assert "DEFERRED" in unschedulable.log()
    assert re.search(
        r"no node of compute .cluster.*Insufficient nvidia.com/gpu", unschedulable.error()
    )
    told = world.client.find_xcom(unschedulable.dag_id, unschedulable.run_id, "count", "step_run")
    assert told["state"] == "failed"
    assert "Insufficient nvidia.com/gpu" in told["reason"]
    assert expired.finish() == "failed"
    assert "ran longer than its timeout of 8 seconds" in expired.error()
    for run in (expired, unschedulable):
        assert run.has_left_nothing()


@contextmanager
def quota_of_one(world: World) -> Iterator[Callable[[], Any]]:
    """Let there be one pod at a time of the pipeline ``crowded``, and one there is; give what deletes it."""
    from kubernetes import client

    api, name = make_api(world.cluster.kubeconfig), world.cluster.namespace
    scheduling = client.SchedulingV1Api(api.api_client)
    scheduling.create_priority_class({"metadata": {"name": name}, "value": 1})
    try:
        of_class = {"scopeName": "PriorityClass", "operator": "In", "values": [name]}
        spec = {"hard": {"pods": "1"}, "scopeSelector": {"matchExpressions": [of_class]}}
        api.create_namespaced_resource_quota(name, {"metadata": {"name": "one"}, "spec": spec})
        wait_until(lambda: api.read_namespaced_resource_quota("one", name).status.hard, "it counts")
        container = {"name": "x", "image": IMAGE}
        busy = {"containers": [container], "priorityClassName": name, "nodeSelector": {"no": "no"}}
        api.create_namespaced_pod(name, {"metadata": {"name": "busy"}, "spec": busy})
        yield lambda: api.delete_namespaced_pod("busy", name, grace_period_seconds=0)
    finally:
        scheduling.delete_priority_class(name)


def test_a_step_that_waits_for_a_quota_holds_no_worker_and_costs_no_retry(world: World) -> None:
    with quota_of_one(world) as make_room:
        run = world.start("crowded")
        run.wait_until(lambda run: run.state == "deferred", "it is deferred")
        assert not run.pods()
        make_room()
        assert run.finish() == "success", run.log()
    assert run.task["try_number"] == 1
    assert run.log().count("Waiting for room in quota 'one'") == 1, run.log()
    assert run.numbers() == [0, 1, 2]
    assert run.has_left_nothing()


def test_a_triggerer_that_is_killed_loses_and_doubles_no_line(world: World) -> None:
    run = world.start("orphaned")
    run.wait_until_deferred(numbers=40)
    first = run.pod().metadata.uid
    kill_and_restart(world.stack, "triggerer")
    run.wait_until(lambda run: run.state == "deferred" and run.pod(), "it is still deferred")
    assert run.pod().metadata.uid == first
    assert run.finish() == "success", run.log()
    assert run.numbers() == list(range(300)), run.log()
    assert run.has_left_nothing()


def kill_and_restart(stack: AirflowStack, component: str, others: list[int] | None = None) -> None:
    os.killpg(stack._processes[component].pid, signal.SIGKILL)
    for pid in others or ():
        os.kill(pid, signal.SIGKILL)
    stack._processes[component].wait()
    time.sleep(2)
    stack._processes[component] = stack._spawn(component)


def parent(pid: int) -> int:
    facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(facts[1])


def test_a_scheduler_that_is_killed_with_its_workers_costs_no_second_pod(world: World) -> None:
    deferred, attended = world.start("orphaned"), world.start("attended")
    deferred.wait_until_deferred()
    attended.wait_until(lambda run: len(run.numbers()) > 5, "lines come")
    first = attended.pod().metadata.uid
    # All of its machine: the processes of tasks outlive a LocalExecutor, and end as those of other tries then.
    processes = [parent(attended.task["pid"]), attended.task["pid"]]
    kill_and_restart(world.stack, "scheduler", processes)
    attended.wait_until(lambda run: run.task["try_number"] == 2, "the next try")
    assert attended.pod().metadata.uid == first
    for run, tries, numbers in ((deferred, 1, 300), (attended, 2, 150)):
        assert run.finish() == "success", run.log(tries)
        assert run.numbers(tries) == list(range(numbers)), run.log(tries)
        assert run.has_left_nothing()


def test_a_worker_that_is_killed_is_followed_by_one_that_adopts_the_pod(world: World) -> None:
    run = world.start("attended")
    run.wait_until(lambda run: len(run.numbers()) > 20, "lines come")
    first = run.pod().metadata.uid
    os.kill(run.task["pid"], signal.SIGKILL)
    run.wait_until(lambda run: run.task["try_number"] == 2, "the next try")
    assert run.pod().metadata.uid == first
    assert run.finish() == "success", run.log(2)
    assert run.numbers(2) == list(range(150)), run.log(2)
    assert run.has_left_nothing()


def test_a_pipeline_of_several_steps_hands_data_on_and_its_second_run_is_reused(
    world: World, request: pytest.FixtureRequest
) -> None:
    if world.cluster.access.state is None:
        missing("images can only be copied into the cluster that tests/cluster starts")
    lake: Lake = request.getfixturevalue("lake")
    lake.put("raw/numbers.txt", b"1 2 3 4")
    first = flow.run(world.client)
    assert first.states == dict.fromkeys(flow.TASKS, "success"), first.states
    made = first.result("report", "report")
    key = made["uri"].removeprefix(f"{lake.root}/")
    assert lake.get(key) == b"10 in 2 parts"
    assert first.metrics("total") == {"total": 10}
    # The pods have moved all of it; the worker has seen none but what it looks up.
    assert {"raw/numbers.txt", "even.txt", "odd.txt", "total"} <= {
        name if name.startswith("raw/") else name.rpartition("/")[2]
        for name in lake.asked("GET", by_pod=True)
    }
    assert not [name for name in lake.asked("GET", by_pod=False) if name.endswith(".txt")]

    by_pods = len([who for who, _, _ in lake.requests if who != lake.host])
    again = flow.run(world.client)
    steps = dict.fromkeys(flow.STEPS, "skipped")
    assert again.states == {**dict.fromkeys(flow.TASKS, "success"), **steps}
    decisions = {name: step["decision"] for name, step in again.plan()["steps"].items()}
    assert decisions == dict.fromkeys(flow.STEPS, "reuse")
    assert again.result("report", "report") == made
    assert len([who for who, _, _ in lake.requests if who != lake.host]) == by_pods  # no pod ran


def test_what_a_killed_worker_without_retries_has_left_goes_with_the_next_run(world: World) -> None:
    run = world.start("lost")
    run.wait_until(lambda run: len(run.numbers()) > 5, "lines come")
    first = run.pod().metadata.uid
    os.kill(run.task["pid"], signal.SIGKILL)
    assert run.finish() == "failed"
    assert first in [pod.metadata.uid for pod in run.pods()]
    database = world.stack.home / "mlpipelines" / "metadata.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        changed = connection.execute("UPDATE mlp_launches SET noted_at = noted_at - 3600").rowcount
    assert changed >= 1
    again = world.start("lost")
    again.wait_until(
        lambda run: first not in [pod.metadata.uid for pod in run.pods()], "the first one is gone"
    )
    assert again.finish() == "success", again.log()
    assert again.has_left_nothing()
