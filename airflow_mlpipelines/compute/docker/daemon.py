"""The Docker daemon: reaching it, and finding, stopping and removing a container on it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from docker import APIClient
    from docker.errors import APIError

    from airflow_mlpipelines.definition.graph import DockerComputeSpec

DEFAULT_URL = "unix://var/run/docker.sock"
STOP_SECONDS = 2
"""What a program has to end by itself. Airflow leaves five seconds for everything."""
_CONFLICT = 409
_REMOVAL_SECONDS = 15.0
_REMOVAL_POLL_SECONDS = 0.05
_UNIX = "unix:"


def daemon_url(compute: DockerComputeSpec) -> str:
    """Return where the compute's daemon listens: its own URL, else ``$DOCKER_HOST``, else the socket."""
    return compute.docker_url or os.environ.get("DOCKER_HOST") or DEFAULT_URL


def connect(
    compute: DockerComputeSpec, *, conn_id: str | None = None, timeout: int = 60
) -> APIClient:
    """Return a connection of its own to the compute's daemon.

    Args:
        compute: The compute.
        conn_id: The Airflow connection of a registry to log in at.
        timeout: How many seconds the daemon may take to answer.

    Raises:
        ComputeUnavailableError: The daemon does not answer, or the registry refuses the login.
    """
    from airflow.providers.docker.hooks.docker import DockerHook
    from airflow.sdk.exceptions import AirflowException

    url = daemon_url(compute)
    try:
        hook = DockerHook(docker_conn_id=conn_id, base_url=url, timeout=timeout)
        return hook.api_client
    except (AirflowException, OSError) as error:  # docker's and requests' errors are OSErrors
        said = getattr(error, "explanation", None)
        if conn_id and said:
            raise ComputeUnavailableError(
                f"compute {compute.name!r}: the registry of Airflow connection {conn_id!r} refuses "
                f"the login: {said}"
            ) from error
        raise unreachable(compute, said or _why_unreachable(url)) from error


def unreachable(compute: DockerComputeSpec, why: str) -> ComputeUnavailableError:
    """Return the error that says which daemon does not answer, and what to do."""
    return ComputeUnavailableError(
        f"compute {compute.name!r}: the Docker daemon at {daemon_url(compute)} does not answer: {why}. Start "
        "it, let this worker use it (group docker), or name another one with docker_url= or DOCKER_HOST."
    )


def find_container(client: APIClient, name: str) -> dict[str, Any] | None:
    """Return what the daemon knows of the container with this name or id, or None."""
    from docker.errors import NotFound

    try:
        found: dict[str, Any] = client.inspect_container(name)
    except NotFound:
        return None
    return found


def has_containers(client: APIClient, step_run_id: str) -> bool:
    """Return whether the daemon has a container of the step run, in whatever state."""
    labels = {"label": f"{STEP_RUN_LABEL}={step_run_id}"}
    return bool(client.containers(all=True, filters=labels))


def find_start(compute: DockerComputeSpec, name: str) -> str | None:
    """Return when a container was started, as ISO 8601; None if it is not there."""
    found = find_container(connect(compute), name)
    return str(found["State"]["StartedAt"]) if found is not None else None


def stop_container(client: APIClient, name: str) -> None:
    """End the container's processes: two seconds after SIGTERM they are killed. Gone is fine."""
    from docker.errors import NotFound

    try:
        client.stop(name, timeout=STOP_SECONDS)
    except NotFound:
        return


def remove_container(client: APIClient, name: str) -> None:
    """Kill the container if it still runs, and remove it with its anonymous volumes. Gone is fine."""
    from docker.errors import APIError, NotFound

    try:
        client.remove_container(name, force=True, v=True)
    except NotFound:
        return
    except APIError as error:
        if error.status_code != _CONFLICT:
            raise
        _await_removal(client, name)  # somebody else is removing it


def end_container(client: APIClient, name: str) -> None:
    """Stop the container and remove it."""
    try:
        stop_container(client, name)
    finally:
        remove_container(client, name)


def is_name_taken(error: APIError) -> bool:
    """Return whether the daemon made no container because there is one of that name."""
    return error.status_code == _CONFLICT and "already in use" in str(error.explanation)


def _await_removal(client: APIClient, name: str) -> None:
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while find_container(client, name) is not None and time.monotonic() < deadline:
        time.sleep(_REMOVAL_POLL_SECONDS)


def _why_unreachable(url: str) -> str:
    if not url.startswith(_UNIX):
        return "no connection"
    socket = Path("/", url.removeprefix(_UNIX).lstrip("/"))
    if not socket.exists():
        return "there is no such socket"
    if not os.access(socket, os.R_OK | os.W_OK):
        return f"user {os.getuid()} may not use that socket"
    return "nobody listens on that socket"
