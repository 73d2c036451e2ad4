"""Several nodes seen from the worker: who is to blame, and what becomes of what all of them have made."""

from __future__ import annotations

import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from airflow_mlpipelines.compute.base import Stage
from airflow_mlpipelines.compute.docker import gang_run as docker_gang
from airflow_mlpipelines.compute.docker.watch import ContainerEnd
from airflow_mlpipelines.compute.gang_logs import GangLogs
from airflow_mlpipelines.compute.kubernetes import gang
from airflow_mlpipelines.compute.kubernetes import gang_run as pod_gang
from airflow_mlpipelines.compute.kubernetes.cluster import Cluster, ClusterError
from airflow_mlpipelines.compute.kubernetes.gang import INDEX
from airflow_mlpipelines.compute.kubernetes.gang_files import merge_node, stage_of_node
from airflow_mlpipelines.compute.kubernetes.gang_start import await_pods
from airflow_mlpipelines.compute.kubernetes.watch import PodEnd
from airflow_mlpipelines.compute.threads import in_parallel
from airflow_mlpipelines.exceptions import ComputeUnavailableError
from airflow_mlpipelines.runtime.metrics import append_metric, read_metrics


@pytest.mark.parametrize(
    ("ends", "node"),
    [
        ([(0, False), (0, False)], None),
        ([(143, False), (1, False), (143, False)], 1),
        ([(1, False), (143, False), (137, True)], 2),
        ([(143, False), None], 1),
        ([(143, False), (143, False)], 0),
    ],
)
def test_the_node_to_blame_is_not_one_that_ended_because_of_another(ends, node):
    containers = {
        number: ContainerEnd(end and {"ExitCode": end[0], "OOMKilled": end[1]})
        for number, end in enumerate(ends)
    }
    pods = {
        number: PodEnd(
            {"metadata": {}},
            end and {"exitCode": end[0], "reason": "OOMKilled" if end[1] else "Error"},
            gone=end is None,
        )
        for number, end in enumerate(ends)
    }

    assert docker_gang.find_culprit(containers) == node
    assert pod_gang.find_culprit(pods) == node


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    made = Stage(
        root=tmp_path / "root",
        code=tmp_path / "root" / "code",
        runtime=tmp_path,
        run=tmp_path / "root" / "run",
        inputs={},
        outputs={},
        outputs_root=tmp_path / "outputs",
    )
    for folder in (made.code, made.run, made.outputs_root):
        folder.mkdir(parents=True)
    return made


def test_what_nodes_have_made_is_one_and_the_lowest_node_s_files_count(stage: Stage):
    for node in range(3):
        own = stage_of_node(stage, node)
        (own.outputs_root / "table").mkdir()
        (own.outputs_root / "table" / f"part-{node}").write_text(str(node))
        (own.outputs_root / "table" / "all").write_text(str(node))
        (own.code / "logs").mkdir()
        (own.code / "logs" / f"rank-{node}.txt").write_text(str(node))
        append_metric(own.run, "scalar", "loss", node)

    refused = [merge_node(stage, node) for node in (1, 2)]

    assert refused == [["table/all"], ["table/all"]]
    table = stage.outputs_root / "table"
    assert {file.name: file.read_text() for file in table.iterdir()} == {
        "part-0": "0",
        "part-1": "1",
        "part-2": "2",
        "all": "0",
    }
    assert len(list((stage.code / "logs").iterdir())) == 3
    assert read_metrics(stage.run)["loss"] == [0, 1, 2]
    lines = (stage.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [1, 2, 3]
    assert not (stage.root / "nodes" / "1").exists()


def test_an_output_that_is_one_file_is_that_of_the_lowest_node(stage: Stage):
    (stage.outputs_root / "model").write_text("of node 0")
    (stage_of_node(stage, 1).outputs_root / "model").write_text("of node 1")

    assert merge_node(stage, 1) == ["model"]
    assert (stage.outputs_root / "model").read_text() == "of node 0"


def test_links_that_a_program_has_made_lead_nowhere_on_the_worker(stage: Stage, tmp_path: Path):
    worker = tmp_path / "worker"
    worker.mkdir()
    (worker / "airflow.cfg").write_text("secret")
    own = stage_of_node(stage, 1)
    (own.code / "outputs").symlink_to(worker)  # would be moved away from the worker
    (stage.code / "logs").symlink_to(worker)  # would be written to
    (own.code / "logs").mkdir()
    (own.code / "logs" / "evil.py").write_text("")
    (stage.run / "metrics.jsonl").symlink_to(worker / "airflow.cfg")
    append_metric(own.run, "scalar", "loss", 1)

    merge_node(stage, 1)

    assert [file.name for file in worker.iterdir()] == ["airflow.cfg"]
    assert (worker / "airflow.cfg").read_text() == "secret"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_what_a_node_has_made_may_go_to_another_disk(stage: Stage):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        elsewhere = replace(stage, outputs_root=Path(other))
        (stage_of_node(elsewhere, 1).outputs_root / "part").write_text("of node 1")

        assert merge_node(elsewhere, 1) == []
        assert Path(other, "part").read_text() == "of node 1"


def test_lines_and_ends_of_all_nodes_arrive_in_one_thread():
    taken: list[tuple[str, bool]] = []
    main = threading.get_ident()

    def watcher(number: int):
        def watch(emit):
            for line in range(2000):
                emit(f"{number} {line}")
            return number * 10

        return watch

    logs: GangLogs[int] = GangLogs(
        [watcher(0), watcher(1)],
        lambda line: taken.append((line, threading.get_ident() == main)),
    )
    while len(logs.ends) < 2:
        logs.follow()

    assert logs.ends == {0: 0, 1: 10}
    assert all(here for _, here in taken)
    for number in range(2):
        own = [line for line, _ in taken if line.startswith(f"{number} ")]
        assert own == [f"{number} {line}" for line in range(2000)]
        assert logs.tails[number][-1] == f"{number} 1999"


def test_nodes_that_the_daemon_did_not_end_are_ended_at_the_next_attempt(monkeypatch):
    over = threading.Event()
    asked: list[str] = []

    def stop(_compute, step_run_id):
        asked.append(step_run_id)
        if len(asked) == 1:
            raise ComputeUnavailableError("the daemon is away")
        over.set()

    def chatters(emit):
        while not over.wait(0.01):  # so that there is always news
            emit("still here")
        return ContainerEnd({"ExitCode": 137, "OOMKilled": False})

    monkeypatch.setattr(docker_gang, "stop_nodes", stop)
    monkeypatch.setattr(docker_gang, "_FOLLOW_SECONDS", 0.2)
    failed = ContainerEnd({"ExitCode": 1, "OOMKilled": False})
    logs: GangLogs[ContainerEnd] = GangLogs([lambda _emit: failed, chatters], lambda _line: None)
    run = docker_gang.GangRun(SimpleNamespace(step_run_id="a step run"), SimpleNamespace())

    run._await_all(logs, 2)

    assert asked == ["a step run"] * 2
    assert set(logs.ends) == {0, 1}


def test_what_a_watcher_raises_is_raised_where_the_gang_is_followed():
    def broken(_emit):
        raise OSError("no daemon")

    with pytest.raises(OSError, match="no daemon"):
        GangLogs([broken], print).follow()


def test_all_calls_are_made_though_one_fails():
    done: list[int] = []

    def call(number: int) -> None:
        if number == 1:
            raise ValueError("one")
        done.append(number)

    with pytest.raises(ValueError, match="one"):
        in_parallel(call, [0, 1, 2])
    assert sorted(done) == [0, 2]


def test_pods_that_are_too_many_are_named_and_not_said_to_lack_a_place():
    names = ["mlp-1-0-aaaaa", "mlp-1-0-bbbbb", "mlp-1-1-ccccc"]
    pods = [
        {
            "metadata": {"name": name, "labels": {INDEX: name.split("-")[2]}},
            "spec": {"nodeName": "one"},
        }
        for name in names
    ]
    compute = SimpleNamespace(name="cluster", schedule_timeout_seconds=0.0)
    ask = lambda *_words, **_options: {"items": pods}  # noqa: E731 - the same for both
    cluster = SimpleNamespace(compute=compute, namespace="ml", ask=ask, ask_patiently=ask)
    spec = SimpleNamespace(nodes=2, name="mlp-1", pod=SimpleNamespace(step_run_id="a step run"))

    with pytest.raises(ComputeUnavailableError) as failed:
        await_pods(cluster, "train", spec, lambda _pod: False, is_stopped=lambda: False)

    assert "step 'train': it needs 2 nodes, and namespace 'ml' has 3 pods" in str(failed.value)
    assert all(name in str(failed.value) for name in names)


@pytest.mark.parametrize("shares", [False, True])
def test_a_node_that_does_not_answer_is_forced_only_if_it_can_write_nowhere(shares):
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "ml-data"}}]
    pod = {
        "metadata": {"name": "mlp-1-1-aaaaa", "labels": {INDEX: "1"}},
        "spec": {"volumes": volumes if shares else []},
    }
    graces = []

    class Lost:
        namespace = "ml"

        def again(self):
            return self

        def ask(self, *_words, **_options):
            return {"items": [pod]}

        ask_patiently = ask

        def delete(self, kind, _name, *, seconds, **_options):
            if kind == "pods":
                graces.append(seconds)

    class Logs:
        def __init__(self):
            self.ends = {}

        def follow(self, _seconds):
            if not self.ends:
                self.ends = {0: PodEnd({"metadata": {}}, {"exitCode": 1})}
                return 0, self.ends[0]
            if 0 in graces:
                self.ends[1] = PodEnd({"metadata": {}}, None, gone=True)
                return 1, self.ends[1]
            return None

    launch = SimpleNamespace(step_run_id="a step run", news=None)
    spec = SimpleNamespace(nodes=2)
    attendant = pod_gang.GangAttendant(Lost(), launch, spec, token="t", note=None, stops=None)
    if shares:
        with pytest.raises(ComputeUnavailableError, match=r"'mlp-1-1-aaaaa'.*kubectl delete node"):
            attendant._await_all(Logs())
        assert graces == [2]
    else:
        attendant._await_all(Logs())
        assert graces == [2, 0]


def test_an_api_server_that_is_away_for_a_moment_loses_no_gang(monkeypatch):
    answers = [ClusterError(503, "away"), {"items": []}]

    def ask(*_words, **_options):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cluster = object.__new__(Cluster)
    monkeypatch.setattr(cluster, "ask", ask, raising=False)
    assert gang.list_pods(cluster, "a step run", patience=10) == []
    answers = [ClusterError(503, "away")]
    with pytest.raises(ClusterError):
        gang.list_pods(cluster, "a step run")
