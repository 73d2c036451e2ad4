"""Which daemon has a step's containers: workers may have one each, and a retry may land beside another one's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.docker.daemon import (
    connect,
    daemon_url,
    has_containers,
    unreachable,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from docker import APIClient

    from airflow_mlpipelines.compute.base import HandleStore
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

OWNER_FILE = "docker-owner"
"""In a step's directory: which try owns its containers."""
_NOTE = "daemon"
_TIMEOUT = 15


@dataclass(frozen=True)
class Daemon:
    """A Docker daemon, as a worker sees it.

    Attributes:
        id: What no other daemon has: its own id, which copies of a machine share, the machine's name and where it
            keeps its containers. Empty where it doesn't say.
        host: The name of its machine.
        url: Where this worker reaches it.
    """

    id: str
    host: str
    url: str


def identify(client: APIClient, compute: DockerComputeSpec) -> Daemon:
    """Return which daemon the connection leads to.

    Raises:
        ComputeUnavailableError: It does not answer.
    """
    try:
        info = client.info()
    except OSError as error:  # docker's and requests' errors are OSErrors
        raise unreachable(compute, str(error)) from error
    host = str(info.get("Name") or "")
    own = info.get("ID")
    known = f"{own} {host} {info.get('DockerRootDir')}" if own else ""
    return Daemon(known, host, daemon_url(compute))


class DaemonHandle:
    """A handle that notes with all that is launched on which daemon that is, and in which directory it works."""

    def __init__(self, handle: HandleStore, daemon: Daemon, directory: Path) -> None:
        self._handle = handle
        self._note = {
            "id": daemon.id,
            "host": daemon.host,
            "url": daemon.url,
            "directory": str(directory),
        }

    def get(self) -> dict[str, Any] | None:
        """Return what an earlier try launched, or None."""
        return self._handle.get()

    def set(self, handle: dict[str, Any] | None) -> None:
        """Remember what was launched, or forget it."""
        self._handle.set(None if handle is None else {**handle, _NOTE: self._note})


def locate(
    step_run_id: str, compute: DockerComputeSpec, own: Daemon, handle: HandleStore
) -> DockerComputeSpec:
    """Return the compute, on the daemon that has an earlier try's containers; as it is where none has any.

    Args:
        step_run_id: The step run.
        compute: The compute, as this worker has it.
        own: Its daemon.
        handle: What an earlier try has launched, maybe from another worker.

    Raises:
        ComputeUnavailableError: They are on a daemon that this worker can't reach, or whose directories it
            does not share: what is at work there is not to be done here once more at the same time.
    """
    noted = (handle.get() or {}).get(_NOTE)
    if not noted or not noted["id"] or not own.id or noted["id"] == own.id:
        return compute
    there = compute.model_copy(update={"docker_url": noted["url"]})
    try:
        client = connect(there, timeout=_TIMEOUT)
        is_that_one = identify(client, there).id == noted["id"]
        is_there = is_that_one and has_containers(client, step_run_id)
    except (ComputeUnavailableError, OSError) as error:
        raise _out_of_reach(compute, noted, own) from error
    if not is_that_one:  # each host calls its own by this URL
        raise _out_of_reach(compute, noted, own)
    if not is_there:
        return compute
    if not (Path(noted["directory"]) / OWNER_FILE).exists():
        raise ComputeUnavailableError(
            f"{_who(compute, noted)}, in a directory ({noted['directory']}) that this worker on host "
            f"{own.host!r} does not share. {_ways_out(noted)}"
        )
    return there


def _out_of_reach(
    compute: DockerComputeSpec, noted: dict[str, Any], own: Daemon
) -> ComputeUnavailableError:
    return ComputeUnavailableError(
        f"{_who(compute, noted)} and may still be at work there. This worker has the daemon of host "
        f"{own.host!r} and can't reach the other one at {noted['url']}. {_ways_out(noted)}"
    )


def _who(compute: DockerComputeSpec, noted: dict[str, Any]) -> str:
    return (
        f"compute {compute.name!r}: an earlier try's container is on the Docker daemon of host "
        f"{noted['host']!r}"
    )


def _ways_out(noted: dict[str, Any]) -> str:
    return (
        f"A retry on a worker of {noted['host']!r} goes on with it; here it would be done twice at once. Give the "
        "workers of each host an Airflow queue of their own, or all workers one daemon (docker_url) and one "
        f"MLPIPELINES_HOME. If {noted['host']!r} is gone for good, clear the task: that begins anew."
    )
