"""Airflow's REST API, as far as starting and following a run needs it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import SubmissionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import httpx

URL_VARIABLE = "AIRFLOW_API_URL"
TOKEN_VARIABLE = "AIRFLOW_API_TOKEN"  # noqa: S105 - the name of a variable
USERNAME_VARIABLE = "AIRFLOW_API_USERNAME"
PASSWORD_VARIABLE = "AIRFLOW_API_PASSWORD"  # noqa: S105 - the name of a variable
_TRIES = 5
_SHOWN_CHARACTERS = 40
_LONGEST_DETAIL = 2000
_PAGE = 100
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _SERVER_ERROR = 401, 403, 404, 500


class AirflowClient:
    """One Airflow server, over its REST API.

    Args:
        url: Its address, without ``/api/v2``.
        token: A token for it; None gets one with the user's name and password.
        username: Who logs in.
        password: The password.

    Raises:
        SubmissionError: The address is none.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        import httpx

        self.url = url.rstrip("/")
        self._credentials = (username, password)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        except httpx.InvalidURL as error:
            raise SubmissionError(f"{url!r} is no address of a server: {error}") from error

    @classmethod
    def from_environment(cls, url: str | None = None) -> AirflowClient:
        """Return a client for ``$AIRFLOW_API_URL``.

        It logs in with ``$AIRFLOW_API_TOKEN``, or ``$AIRFLOW_API_USERNAME`` and
        ``$AIRFLOW_API_PASSWORD``.

        Raises:
            SubmissionError: No server is named.
        """
        url = url or os.environ.get(URL_VARIABLE)
        if not url:
            raise SubmissionError(
                f"no Airflow server is named: set {URL_VARIABLE}, and {TOKEN_VARIABLE} or "
                f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE}."
            )
        return cls(
            url,
            token=os.environ.get(TOKEN_VARIABLE),
            username=os.environ.get(USERNAME_VARIABLE),
            password=os.environ.get(PASSWORD_VARIABLE),
        )

    @classmethod
    def from_connection(cls, conn_id: str) -> AirflowClient:
        """Return a client for the server of an Airflow connection: its host, login and password.

        Raises:
            SubmissionError: There is no such connection.
        """
        from airflow.sdk import Connection
        from airflow.sdk.exceptions import AirflowNotFoundException, AirflowRuntimeError

        try:
            connection = Connection.get(conn_id)
        except (AirflowNotFoundException, AirflowRuntimeError) as error:
            raise SubmissionError(f"there is no Airflow connection {conn_id!r}") from error
        host = connection.host or ""
        if "://" not in host:
            host = f"{connection.schema or 'http'}://{host}"
        if connection.port:
            host = f"{host}:{connection.port}"
        return cls(host, username=connection.login, password=connection.password)

    # ---- calls -----------------------------------------------------------------------------

    def find_dag(self, dag_id: str) -> dict[str, Any] | None:
        """Return a DAG as the server describes it, or None if it has none of this id."""
        response = self._send("GET", f"/api/v2/dags/{dag_id}")
        return None if response.status_code == _NOT_FOUND else _read(response)

    def find_pool(self, name: str) -> dict[str, Any] | None:
        """Return a pool as the server describes it, or None if it has none of this name."""
        response = self._send("GET", f"/api/v2/pools/{name}")
        return None if response.status_code == _NOT_FOUND else _read(response)

    def unpause(self, dag_id: str) -> None:
        """Let the server run a DAG."""
        _read(self._send("PATCH", f"/api/v2/dags/{dag_id}", json={"is_paused": False}))

    def trigger(
        self, dag_id: str, conf: Mapping[str, Any] | None = None, *, note: str | None = None
    ) -> str:
        """Start a run and return its id.

        Raises:
            SubmissionError: The DAG is not there, or a parameter is not what its schema wants.
        """
        body = {"logical_date": None, "conf": dict(conf or {}), "note": note}
        response = self._send("POST", f"/api/v2/dags/{dag_id}/dagRuns", json=body)
        if response.status_code == _NOT_FOUND:
            raise SubmissionError(
                f"{self.url} has no DAG {dag_id!r}. Put the pipeline's file into the server's DAG folder, "
                "and see there whether it has import errors."
            )
        return str(_read(response)["dag_run_id"])

    def get_run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return a run as the server describes it."""
        return _read(self._send("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}"))

    def list_task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return all task instances of a run."""
        found: list[dict[str, Any]] = []
        while True:
            page = _read(
                self._send(
                    "GET",
                    f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances",
                    params={"limit": _PAGE, "offset": len(found)},
                )
            )
            found += page["task_instances"]
            if len(found) >= page["total_entries"] or not page["task_instances"]:
                return found

    def find_xcom(self, dag_id: str, run_id: str, task_id: str, key: str) -> Any | None:
        """Return an XCom's value as it is stored, or None if there is none."""
        response = self._send(
            "GET",
            f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}",
            params={"deserialize": False, "stringify": False},
        )
        return None if response.status_code == _NOT_FOUND else _read(response)["value"]

    def get_log(self, dag_id: str, run_id: str, task_id: str, try_number: int) -> list[str]:
        """Return the lines of a try's log."""
        response = self._send(
            "GET",
            f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}",
            params={"map_index": -1},
        )
        if response.status_code == _NOT_FOUND:
            return []
        content = _read(response)["content"]
        return [line["event"] if isinstance(line, dict) else str(line) for line in content]

    def cancel(self, dag_id: str, run_id: str) -> None:
        """Fail a run that is not over: its running tasks are killed."""
        body = {"state": "failed"}
        _read(self._send("PATCH", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}", json=body))

    def clear(self, dag_id: str, run_id: str, task_ids: list[str]) -> None:
        """Let tasks of a run start again."""
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": task_ids, "only_failed": False}
        _read(self._send("POST", f"/api/v2/dags/{dag_id}/clearTaskInstances", json=body))

    def list_import_errors(self) -> list[str]:
        """Return the errors of DAG files that the server can't import."""
        errors = _read(self._send("GET", "/api/v2/importErrors"))["import_errors"]
        return [f"{item['filename']}: {item['stack_trace']}" for item in errors]

    # ---- the wire --------------------------------------------------------------------------

    def _log_in(self) -> httpx.Response | None:
        """Get a token; return the server's answer if it is not well enough to give one.

        Raises:
            SubmissionError: It does not accept the login, or there is none to try.
        """
        username, password = self._credentials
        if username is None or password is None:
            raise SubmissionError(
                f"{self.url} wants a login: set {TOKEN_VARIABLE}, or {USERNAME_VARIABLE} and "
                f"{PASSWORD_VARIABLE}."
            )
        response = self._http.post("/auth/token", json={"username": username, "password": password})
        if response.status_code in (_UNAUTHORIZED, _FORBIDDEN):
            raise SubmissionError(f"{self.url} does not accept the login of {username!r}")
        if response.status_code >= _SERVER_ERROR:
            return response
        self._http.headers["Authorization"] = f"Bearer {_read(response)['access_token']}"
        return None

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Send a request; try again where that can't start anything twice."""
        import httpx

        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1
            try:
                no_login = None if "Authorization" in self._http.headers else self._log_in()
                response = no_login or self._http.request(method, path, **arguments)
            except httpx.TransportError as error:
                arrived = method == "POST" and not isinstance(error, httpx.ConnectError)
                if last or arrived or isinstance(error, httpx.UnsupportedProtocol):
                    raise SubmissionError(f"{self.url} can't be reached: {error}") from error
            else:
                if response.status_code == _UNAUTHORIZED and self._credentials[0] and attempt == 0:
                    del self._http.headers["Authorization"]  # the token has run out
                    continue
                arrived = method == "POST" and no_login is None
                if response.status_code < _SERVER_ERROR or arrived or last:
                    return response
            time.sleep(0.2 * 2**attempt)
        raise AssertionError("the last try returns or raises")


def _read(response: httpx.Response) -> dict[str, Any]:
    """Return the answer's JSON.

    Raises:
        SubmissionError: The server refused, with its own words; or is no Airflow.
    """
    request = f"{response.request.method} {response.request.url.path}"
    if response.is_success:
        try:
            return dict(response.json()) if response.content else {}
        except (TypeError, ValueError) as error:
            raise SubmissionError(
                f"{response.request.url.host} answers {request} as no Airflow does; is {URL_VARIABLE} "
                f"right? It begins with {response.text[:_SHOWN_CHARACTERS]!r}"
            ) from error
    detail = _find_detail(response)
    if response.status_code in (_UNAUTHORIZED, _FORBIDDEN):
        raise SubmissionError(f"Airflow does not allow {request} to this login: {detail}")
    raise SubmissionError(f"Airflow refused {request} ({response.status_code}): {detail}")


def _find_detail(response: httpx.Response) -> str:
    """Return why the server refused, in its own words."""
    try:
        detail = response.json()["detail"]
    except (ValueError, TypeError, KeyError, IndexError):
        detail = response.text
    if isinstance(detail, dict):
        detail = detail.get("message") or detail.get("reason") or detail
    elif isinstance(detail, list):  # FastAPI's way to say which field of the request is wrong
        detail = "; ".join(map(_describe_field, detail))
    return str(detail)[:_LONGEST_DETAIL]


def _describe_field(problem: Any) -> str:
    if not isinstance(problem, dict) or "msg" not in problem:
        return str(problem)
    return f"{'.'.join(map(str, problem.get('loc') or ()))}: {problem['msg']}"
