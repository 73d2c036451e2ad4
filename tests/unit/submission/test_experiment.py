"""Experiments: what a run is told, and runs on a server."""

from __future__ import annotations

import pytest

from airflow_mlpipelines import CommandStep, Experiment, Pipeline, PipelineParameter, Workspace
from airflow_mlpipelines.exceptions import PipelineCheckError, SubmissionError
from airflow_mlpipelines.submission.experiment import make_conf

DAG = "/api/v2/dags/flights"
RUN = f"{DAG}/dagRuns/run1"


@pytest.fixture
def pipeline():
    """A pipeline of one step and one parameter."""
    step = CommandStep(["echo", PipelineParameter("rate", 0.5)], "say")
    return Pipeline(Workspace.embedded(), [step], name="flights")


@pytest.fixture
def airflow(server, monkeypatch):
    """The server that the environment names; it has the DAG, and the run is over."""
    monkeypatch.setenv("AIRFLOW_API_URL", server.url)
    monkeypatch.setenv("AIRFLOW_API_TOKEN", "good")
    tasks = [{"task_id": "say", "state": "success", "duration": 1.0}]
    record = {"state": "ran", "reason": "never ran before in this pipeline", "seconds": 1.0}
    server.answers = {
        f"POST {DAG}/dagRuns": [(200, {"dag_run_id": "run1"})],
        f"GET {RUN}": [(200, {"state": "success"})],
        f"GET {RUN}/taskInstances": [(200, {"task_instances": tasks, "total_entries": 1})],
        f"GET {RUN}/taskInstances/say/xcomEntries/step_run": [(200, {"value": record})],
        f"GET {RUN}/taskInstances/say/logs/1": [(200, {"content": [{"event": "0.5"}]})],
        f"PATCH {RUN}": [(200, {"state": "failed"})],
    }
    return server


@pytest.mark.parametrize(
    ("parameters", "regenerate", "conf"),
    [
        (None, False, {}),
        ({"rate": 1.0}, False, {"rate": 1.0}),
        (None, True, {"regenerate_outputs": ["all"]}),
        ({"rate": 1.0}, ["say"], {"rate": 1.0, "regenerate_outputs": ["say"]}),
        (None, [], {}),
    ],
)
def test_a_run_is_told_its_parameters_and_what_to_regenerate(parameters, regenerate, conf):
    assert make_conf(parameters, regenerate) == conf


def test_the_parameters_given_are_left_as_they_are():
    given = {"rate": 1.0}

    make_conf(given, True)

    assert given == {"rate": 1.0}


def test_where_the_environment_names_a_server_the_run_is_started_there(pipeline, airflow):
    experiment = Experiment(pipeline.workspace, "delays")

    run = experiment.submit(pipeline, {"rate": 1.0}, regenerate_outputs=True)

    (started,) = airflow.asked(f"POST {DAG}/dagRuns")
    assert started.body["conf"] == {"rate": 1.0, "regenerate_outputs": ["all"]}
    assert (run.dag_id, run.id, run.experiment) == ("flights", "run1", "delays")
    assert run.wait_for_completion(show_output=False) == "Finished"
    (step,) = run.get_steps()
    assert (step.state, step.seconds) == ("ran", 1.0)
    assert run.get_log("say") == ["0.5"]


def test_a_run_on_a_server_can_be_ended(pipeline, airflow):
    Experiment(pipeline.workspace, "delays").submit(pipeline).cancel()

    assert [item.body for item in airflow.asked(f"PATCH {RUN}")] == [{"state": "failed"}]


def test_a_connection_names_a_server_too(pipeline, airflow, monkeypatch):
    monkeypatch.delenv("AIRFLOW_API_URL")
    monkeypatch.setenv("AIRFLOW_CONN_PROD", airflow.url.replace("//", "//ann:secret@"))
    airflow.answers["POST /auth/token"] = [(201, {"access_token": "good"})]

    run = Experiment(pipeline.workspace, "delays").submit(pipeline, airflow_conn_id="prod")

    assert run.id == "run1"


def test_a_connection_that_is_not_there_is_named(pipeline, monkeypatch):
    monkeypatch.delenv("AIRFLOW_API_URL", raising=False)

    with pytest.raises(SubmissionError, match="there is no Airflow connection 'absent'"):
        Experiment(pipeline.workspace, "delays").submit(pipeline, airflow_conn_id="absent")


def test_a_pipeline_with_problems_asks_no_server(airflow):
    step = CommandStep(["true"], "say", compute_target="gpu")
    broken = Pipeline(Workspace.embedded(), [step], name="flights")

    with pytest.raises(PipelineCheckError, match="'gpu'"):
        Experiment(broken.workspace, "delays").submit(broken)
    assert airflow.requests == []
