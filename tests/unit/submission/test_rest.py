"""The client of Airflow's REST API, against a real HTTP server."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.exceptions import SubmissionError
from airflow_mlpipelines.submission.rest import AirflowClient

DAG = "/api/v2/dags/flights"
RUN = f"{DAG}/dagRuns/run1"


@pytest.fixture
def client(server):
    """A client with a token that the server takes."""
    return AirflowClient(f"{server.url}/", token="good")


# ---- logging in --------------------------------------------------------------------------------


def test_a_name_and_a_password_get_a_token_once(server):
    server.tokens = ["fresh"]
    server.answers = {
        "POST /auth/token": [(201, {"access_token": "fresh"})],
        f"GET {DAG}": [(200, {"dag_id": "flights"})],
    }
    client = AirflowClient(server.url, username="ann", password="secret")

    assert client.find_dag("flights") == {"dag_id": "flights"}
    assert client.find_dag("flights") == {"dag_id": "flights"}
    (login,) = server.asked("POST /auth/token")
    assert login.body == {"username": "ann", "password": "secret"}
    assert [item.token for item in server.asked(f"GET {DAG}")] == ["fresh", "fresh"]


def test_an_expired_token_is_followed_by_another_login(server):
    server.tokens = ["second"]
    server.answers = {
        "POST /auth/token": [(201, {"access_token": token}) for token in ("first", "second")],
        f"POST {DAG}/dagRuns": [(200, {"dag_run_id": "run1"})],
    }
    client = AirflowClient(server.url, username="ann", password="secret")

    assert client.trigger("flights") == "run1"
    assert [item.token for item in server.asked(f"POST {DAG}/dagRuns")] == ["first", "second"]


def test_a_login_that_is_refused_is_told_without_the_password(server):
    server.tokens = []
    server.answers = {"POST /auth/token": [(401, {"detail": "Invalid credentials"})]}
    client = AirflowClient(server.url, username="ann", password="secret")

    with pytest.raises(SubmissionError, match="does not accept the login of 'ann'") as caught:
        client.find_dag("flights")
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_client_that_cannot_log_in_says_which_variables_are_wanted(server):
    client = AirflowClient(server.url)

    with pytest.raises(SubmissionError, match="set AIRFLOW_API_TOKEN, or AIRFLOW_API_USERNAME"):
        client.find_dag("flights")
    assert server.requests == []


def test_a_token_that_is_not_accepted_is_told_with_the_servers_words(server):
    server.tokens = ["other"]

    with pytest.raises(SubmissionError, match=r"does not allow GET .*Invalid JWT token"):
        AirflowClient(server.url, token="mine").find_dag("flights")
    assert len(server.requests) == 1


def test_what_a_login_may_not_do_is_told(server, client):
    server.answers = {f"PATCH {DAG}": [(403, {"detail": "Forbidden"})]}

    with pytest.raises(SubmissionError, match=r"does not allow PATCH .*flights to this login"):
        client.unpause("flights")


def test_the_environment_names_the_server_and_the_login(server, monkeypatch):
    server.tokens = ["good"]
    server.answers = {f"GET {DAG}": [(200, {"dag_id": "flights"})]}
    monkeypatch.setenv("AIRFLOW_API_URL", server.url)
    monkeypatch.setenv("AIRFLOW_API_TOKEN", "good")

    assert AirflowClient.from_environment().find_dag("flights") == {"dag_id": "flights"}


def test_without_a_server_the_variables_are_named(monkeypatch):
    monkeypatch.delenv("AIRFLOW_API_URL", raising=False)

    with pytest.raises(SubmissionError, match="set AIRFLOW_API_URL, and AIRFLOW_API_TOKEN or"):
        AirflowClient.from_environment()


@pytest.mark.parametrize(
    ("uri", "url"),
    [
        ("http://ann:secret@airflow.example:8080", "http://airflow.example:8080"),
        ("http://ann:secret@airflow.example/https", "https://airflow.example"),
    ],
)
def test_an_airflow_connection_names_the_server(monkeypatch, uri, url):
    monkeypatch.setenv("AIRFLOW_CONN_PRODUCTION", uri)

    client = AirflowClient.from_connection("production")

    assert client.url == url
    assert client._credentials == ("ann", "secret")


# ---- what it is asked --------------------------------------------------------------------------


def test_a_run_is_started_with_its_configuration(server, client):
    server.answers = {f"POST {DAG}/dagRuns": [(200, {"dag_run_id": "run1"})]}

    assert client.trigger("flights", {"rate": 0.5}, note="nightly") == "run1"
    (request,) = server.requests
    assert request.body == {"logical_date": None, "conf": {"rate": 0.5}, "note": "nightly"}


def test_what_is_not_there_is_none(server, client):
    assert client.find_dag("flights") is None
    assert client.find_xcom("flights", "run1", "clean", "step_run") is None
    assert client.get_log("flights", "run1", "clean", 1) == []


def test_a_dag_that_the_server_lacks_is_named_with_the_remedy(server, client):
    with pytest.raises(SubmissionError, match=r"has no DAG 'flights'\. Put the pipeline's file"):
        client.trigger("flights")


def test_a_run_that_the_server_lacks_is_an_error(server, client):
    with pytest.raises(SubmissionError, match=r"refused GET .*run1 \(404\): Not Found"):
        client.get_run("flights", "run1")


@pytest.mark.parametrize(
    ("detail", "told"),
    [
        ("Invalid input for param rate: 5 is more than 1", "param rate: 5 is more than 1"),
        ({"message": "rate is too large"}, r"\(422\): rate is too large$"),
        ({"reason": "Unique constraint violation"}, r"\(422\): Unique constraint violation$"),
        (
            [{"type": "missing", "loc": ["body", "logical_date"], "msg": "Field required"}],
            r"\(422\): body\.logical_date: Field required$",
        ),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(server, client, detail, told):
    server.answers = {f"POST {DAG}/dagRuns": [(422, {"detail": detail})]}

    with pytest.raises(SubmissionError, match=told):
        client.trigger("flights", {"rate": 5})


@pytest.mark.parametrize(
    ("status", "body"), [(200, "<html>Welcome</html>"), (400, "<html>Bad</html>"), (400, ["x"])]
)
def test_a_server_that_is_no_airflow_is_told_from_one(server, client, status, body):
    server.answers = {f"GET {DAG}": [(status, body)]}

    with pytest.raises(SubmissionError, match=r"/api/v2/dags/flights"):
        client.find_dag("flights")


def test_all_pages_of_task_instances_are_read(server, client):
    tasks = [{"task_id": f"step{number}"} for number in range(250)]
    server.answers = {
        f"GET {RUN}/taskInstances": [
            (200, {"task_instances": tasks[start : start + 100], "total_entries": 250})
            for start in (0, 100, 200)
        ]
    }

    assert client.list_task_instances("flights", "run1") == tasks
    assert [item.query for item in server.requests] == [
        {"limit": "100", "offset": str(start)} for start in (0, 100, 200)
    ]


def test_tasks_that_vanish_between_two_pages_do_not_stop_the_reading(server, client):
    server.answers = {
        f"GET {RUN}/taskInstances": [
            (200, {"task_instances": [{"task_id": "clean"}], "total_entries": 2}),
            (200, {"task_instances": [], "total_entries": 2}),
        ]
    }

    assert client.list_task_instances("flights", "run1") == [{"task_id": "clean"}]


def test_an_xcom_is_asked_for_as_it_is_stored(server, client):
    path = f"{RUN}/taskInstances/clean/xcomEntries/step_run"
    server.answers = {f"GET {path}": [(200, {"key": "step_run", "value": {"state": "ran"}})]}

    assert client.find_xcom("flights", "run1", "clean", "step_run") == {"state": "ran"}
    assert server.requests[0].query == {"deserialize": "false", "stringify": "false"}


def test_a_run_id_with_a_time_zone_reaches_the_server_unharmed(server, client):
    run_id = "manual__2026-03-01T12:00:00.123+00:00"
    server.answers = {f"GET {DAG}/dagRuns/{run_id}": [(200, {"state": "running"})]}

    assert client.get_run("flights", run_id) == {"state": "running"}


def test_a_log_is_lines_however_the_server_tells_them(server, client):
    content = [{"event": "::group::", "timestamp": None}, {"event": "cleaning"}, "plain"]
    server.answers = {f"GET {RUN}/taskInstances/clean/logs/2": [(200, {"content": content})]}

    assert client.get_log("flights", "run1", "clean", 2) == ["::group::", "cleaning", "plain"]


def test_a_run_is_ended_by_failing_it(server, client):
    server.answers = {f"PATCH {RUN}": [(200, {"state": "failed"})]}

    client.cancel("flights", "run1")

    assert server.requests[0].body == {"state": "failed"}


def test_tasks_are_cleared_for_good(server, client):
    server.answers = {f"POST {DAG}/clearTaskInstances": [(200, {})]}

    client.clear("flights", "run1", ["clean"])

    body = server.requests[0].body
    assert (body["dry_run"], body["dag_run_id"]) == (False, "run1")
    assert (body["task_ids"], body["only_failed"]) == (["clean"], False)


# ---- when the server is in trouble -------------------------------------------------------------


def test_a_question_is_asked_again_after_503(server, client):
    server.answers = {f"GET {DAG}": [(503, "busy"), (503, "busy"), (200, {"dag_id": "flights"})]}

    assert client.find_dag("flights") == {"dag_id": "flights"}
    assert len(server.requests) == 3


def test_a_run_is_not_started_again_after_503(server, client):
    server.answers = {f"POST {DAG}/dagRuns": [(503, "busy"), (200, {"dag_run_id": "run1"})]}

    with pytest.raises(SubmissionError, match=r"refused POST .*\(503\): busy"):
        client.trigger("flights")
    assert len(server.requests) == 1


def test_a_login_is_tried_again_after_503(server):
    server.tokens = ["fresh"]
    server.answers = {
        "POST /auth/token": [(503, "busy"), (201, {"access_token": "fresh"})],
        f"POST {DAG}/dagRuns": [(200, {"dag_run_id": "run1"})],
    }
    client = AirflowClient(server.url, username="ann", password="secret")

    assert client.trigger("flights") == "run1"
    assert len(server.asked(f"POST {DAG}/dagRuns")) == 1


def test_a_server_that_never_lets_anybody_in_is_told(server):
    server.answers = {"POST /auth/token": [(503, "busy")]}
    client = AirflowClient(server.url, username="ann", password="secret")

    with pytest.raises(SubmissionError, match=r"refused POST /auth/token \(503\): busy"):
        client.trigger("flights")


def test_a_run_whose_start_was_cut_off_is_not_started_again(client, server, monkeypatch):
    def hang_up(request):
        server.requests.append(request)
        raise ConnectionAbortedError

    monkeypatch.setattr(server, "answer", hang_up)

    with pytest.raises(SubmissionError, match="can't be reached"):
        client.trigger("flights")
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["airflow.example", "http://airflow.example:port", ""])
def test_an_address_that_is_none_is_told(url):
    with pytest.raises(SubmissionError, match=r"can't be reached|is no address"):
        AirflowClient(url, token="good").trigger("flights")
