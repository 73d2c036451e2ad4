"""A compute's ``max_nodes`` is kept by a pool of Airflow's, which has to be there and to count all that it is to count."""

from __future__ import annotations

import pytest

from airflow_mlpipelines import CommandStep, KubernetesCompute, LocalCompute, Pipeline, Workspace
from airflow_mlpipelines.exceptions import SubmissionError
from airflow_mlpipelines.submission.remote import submit_over_rest
from airflow_mlpipelines.submission.rest import AirflowClient

POOL = "GET /api/v2/pools/mlpipelines_few"
START = "POST /api/v2/dags/few/dagRuns"
PODS = {"image": "python:3.12-slim", "max_nodes": 3}
COUNTING = "airflow pools set --include-deferred mlpipelines_few 3 "


def submit(server, compute):
    step = CommandStep(["true"], name="one", compute_target=compute)
    pipeline = Pipeline(Workspace.from_config(), [step], name="few")
    submit_over_rest(pipeline, {}, client=AirflowClient(server.url, token="good"))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    server.answers = {START: [(200, {"dag_run_id": "run1"})]}


@pytest.mark.parametrize(
    ("compute", "command"),
    [
        (LocalCompute("few", max_nodes=3), "airflow pools set mlpipelines_few 3 "),
        (KubernetesCompute("few", **PODS), COUNTING),
        (
            KubernetesCompute("few", deferrable=False, **PODS),
            "airflow pools set mlpipelines_few 3 ",
        ),
    ],
    ids=["local", "kubernetes", "kubernetes with a worker"],
)
def test_a_pool_that_is_not_there_is_named_with_the_command_that_makes_it(server, compute, command):
    with pytest.raises(SubmissionError, match=rf"would wait for ever.* {command}"):
        submit(server, compute)


def test_a_pool_that_does_not_count_steps_without_a_worker_is_told(server):
    server.answers[POOL] = [(200, {"name": "mlpipelines_few", "include_deferred": False})]
    with pytest.raises(SubmissionError, match=rf"does not count deferred tasks.* {COUNTING}"):
        submit(server, KubernetesCompute("few", **PODS))
    submit(server, KubernetesCompute("few", deferrable=False, **PODS))
    submit(server, LocalCompute("few", max_nodes=3))
    assert len(server.asked(START)) == 2


def test_a_pool_that_counts_them_is_fine(server):
    server.answers[POOL] = [(200, {"name": "mlpipelines_few", "include_deferred": True})]
    submit(server, KubernetesCompute("few", **PODS))
    assert len(server.asked(START)) == 1
