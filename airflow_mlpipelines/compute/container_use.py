"""What the Docker daemon of this machine says of the GPUs of a container, asked without Docker's package.

Whoever waits for a GPU asks this, local processes too: a container keeps its GPUs when its worker is gone.
"""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_UNIX = "unix:"
_ALIVE = frozenset({"running", "paused", "restarting"})
_OK, _NOT_FOUND = 200, 404
_SECONDS = 10


def local_socket(url: str) -> Path | None:
    """Return the socket that a daemon on this machine listens on; None for a daemon elsewhere."""
    if not url.startswith(_UNIX):
        return None
    return Path("/", url.removeprefix(_UNIX).lstrip("/"))


def requested_gpus(container: Mapping[str, Any]) -> list[str] | None:
    """Return the ids that a container was given, by what the daemon says of it.

    None is any: the daemon was asked for a number of them, and has chosen.
    """
    requests = container.get("HostConfig", {}).get("DeviceRequests") or []
    if any(not request.get("DeviceIDs") for request in requests):
        return None
    return [str(name) for request in requests for name in request["DeviceIDs"]]


def is_using(container: Mapping[str, Any], gpu: str) -> bool:
    """Return whether a container is running with a GPU of this id, as far as the daemon says."""
    ids = requested_gpus(container)
    return container["State"]["Status"] in _ALIVE and (ids is None or gpu in ids)


def is_used(daemon: Path, containers: Sequence[str], gpu: str) -> bool | None:
    """Return whether one of these containers is running with a GPU; None if the daemon does not answer."""
    try:
        found = [_inspect(daemon, name) for name in containers]
    except (OSError, HTTPException, ValueError):
        return None
    return any(container is not None and is_using(container, gpu) for container in found)


class _SocketConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("docker", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _inspect(daemon: Path, container: str) -> dict[str, Any] | None:
    connection = _SocketConnection(daemon)
    try:
        connection.request("GET", f"/containers/{quote(container, safe='')}/json")
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.status == _NOT_FOUND:
        return None
    if answer.status != _OK:
        raise HTTPException(answer.reason)
    found: dict[str, Any] = json.loads(data)
    return found
