"""The nodes of a gang: none begins before all are there, and all end with the first that fails.

A launcher that starts a gang on several nodes sets ``MLP_GANG`` on each (a :class:`Place` as JSON), and
``MLP_GANG_TOKEN``, the same on all. Node 0 waits for the others; each of them waits for node 0.
"""

from __future__ import annotations

import json
import os
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow_mlpipelines.runtime.connection import Connection, LostError, listen
from airflow_mlpipelines.runtime.node_shell import serve_shell

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

GANG = "MLP_GANG"
TOKEN = "MLP_GANG_TOKEN"  # noqa: S105 - a variable's name
PORT = 29400
_INDEX = "JOB_COMPLETION_INDEX"  # which Kubernetes tells each pod of a Job
FOLLOWED = 143
"""The exit code of a node that was ended because of another one."""
_RETRY_SECONDS = 0.2
_FLUSH_SECONDS = 2.0


class NotTogetherError(Exception):
    """Some nodes have not come in time."""


class Place:
    """What a node is told: its number, every node's host name, and how long to wait for all of them."""

    def __init__(
        self, node: int, hosts: list[str], *, port: int, wait_seconds: float, token: str
    ) -> None:
        self.node = node
        self.hosts = hosts
        self.port = port
        self.wait_seconds = wait_seconds
        self.token = token

    @classmethod
    def from_environment(cls) -> Place | None:
        """Return this node's place, or None where a gang has this one node."""
        if GANG not in os.environ:
            return None
        told = json.loads(os.environ[GANG])
        return cls(
            int(told.get("node", os.environ.get(_INDEX, "0"))),
            [str(host) for host in told["hosts"]],
            port=int(told.get("port", PORT)),
            wait_seconds=float(told["wait_seconds"]),
            token=os.environ[TOKEN],
        )

    def name(self, node: int) -> str:
        """Return how messages call a node."""
        return f"node {node} ({self.hosts[node]})"

    def find_host(self, name: str) -> str | None:
        """Return the node that ``name`` means, also where a domain was cut off; None if there is none."""
        short = name.partition(".")[0]
        return next((host for host in self.hosts if host.partition(".")[0] == short), None)


class Nodes(ABC):
    """The other nodes, as this one sees them. One of :func:`meet`'s two kinds."""

    plan: dict[str, Any]
    """What node 0 has told all of them before the start."""
    report: dict[str, Any] | None = None
    """What was told to node 0 of the first rank that failed, as :func:`report_rank` has it; on other nodes, None."""
    blamed_for: tuple[str, ...] = ()
    """The end of the log of the rank for which this node has to answer, once :meth:`verdict` says so."""

    @abstractmethod
    def verdict(self) -> tuple[int, str] | None:
        """Return the exit code for this node and, if it is not 0, why; None as long as all goes well."""

    @abstractmethod
    def done(self) -> None:
        """Say that all has ended well here. May be said again."""

    @abstractmethod
    def fail(self, code: int, why: str) -> None:
        """Say that something has failed here: all others end."""

    def blame(self, node: int, code: int, why: str, tail: Sequence[str]) -> None:
        """Have all other nodes end; ``node`` with ``code``, and the end of the log of the rank that failed there.

        Only node 0 can.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Leave; what was said still arrives."""


def meet(place: Place, offer: dict[str, Any]) -> Nodes:
    """Return the other nodes, once all are there.

    Args:
        place: This node's.
        offer: What all nodes shall know of this one; each finds all offers in ``plan["offers"]``.

    Raises:
        NotTogetherError: Not all have come in time; the message names those that are missing.
    """
    return _First(place, offer) if place.node == 0 else _Other(place, offer)


class _First(Nodes):
    """Node 0's view: it hears of every other node."""

    def __init__(self, place: Place, offer: dict[str, Any]) -> None:
        self._place = place
        self._offers = {0: offer}
        self._connections: dict[int, Connection] = {}
        self._waiting = set(range(1, len(place.hosts)))
        self._changed = threading.Condition()
        self._trouble: tuple[int, str] | None = None
        self._readers: list[threading.Thread] = []
        self._done = False
        _serve(place, {"join": self._join, "report": self._note})
        with self._changed:
            self._changed.wait_for(self._is_decided, place.wait_seconds)
            trouble = self._missing()
            if trouble is not None:
                self._tell(*trouble)
                raise NotTogetherError(trouble[1])
        self.plan = {"offers": [self._offers[node] for node in range(len(place.hosts))]}
        for node, connection in self._connections.items():
            try:
                connection.send(kind="start", plan=self.plan)
            except LostError:
                self._lose(node, "was lost")

    def verdict(self) -> tuple[int, str] | None:
        with self._changed:
            if self._trouble is not None:
                self._tell(*self._trouble)
                return self._trouble
            if self._done and not self._waiting:
                self._tell(0, "")
                return 0, ""
        return None

    def done(self) -> None:
        self._done = True

    def fail(self, code: int, why: str) -> None:
        self._tell(code, why)

    def blame(self, node: int, code: int, why: str, tail: Sequence[str]) -> None:
        with suppress(KeyError, LostError):
            self._connections[node].send(kind="end", code=code, why=why, tail=tail)
        self._tell(FOLLOWED, f"{self._place.name(node)}: {why}")

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        deadline = time.monotonic() + _FLUSH_SECONDS
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))

    def _is_decided(self) -> bool:
        return self._trouble is not None or len(self._offers) == len(self._place.hosts)

    def _missing(self) -> tuple[int, str] | None:
        """Return why there is no start: a node was lost before it, or some have not come."""
        place = self._place
        if self._trouble is not None:
            return self._trouble
        missing = [place.name(node) for node in range(len(place.hosts)) if node not in self._offers]
        if not missing:
            return None
        return (
            FOLLOWED,
            f"of {len(place.hosts)} nodes, {', '.join(missing)} did not come within "
            f"{place.wait_seconds:g} seconds",
        )

    def _join(self, connection: Connection, message: dict[str, Any]) -> None:
        """Take a node in, and hear it until its end. Runs in the connection's own thread."""
        node = int(message["node"])
        with self._changed:
            if node in self._connections or node not in self._waiting:
                connection.close()
                return
            self._connections[node] = connection
            self._offers[node] = message["offer"]
            self._readers.append(threading.current_thread())
            self._changed.notify_all()
        connection.keep_alive()
        try:
            while True:
                heard = connection.receive()
                with self._changed:
                    if heard["kind"] == "done":
                        self._waiting.discard(node)
                    elif heard["kind"] == "failed" and self._trouble is None:
                        self._trouble = FOLLOWED, f"{self._place.name(node)}: {heard['why']}"
        except LostError:
            self._lose(node, "was lost")

    def _note(self, connection: Connection, message: dict[str, Any]) -> None:
        """Take in what a rank's process says of its end. Runs in the connection's own thread."""
        with self._changed:
            if self.report is None:
                self.report = message
        connection.send(kind="noted")
        connection.close()

    def _lose(self, node: int, how: str) -> None:
        with self._changed:
            if self._trouble is None:
                self._trouble = FOLLOWED, f"{self._place.name(node)} {how}"
            self._changed.notify_all()

    def _tell(self, code: int, why: str) -> None:
        for connection in self._connections.values():
            with suppress(LostError):
                connection.send(kind="end", code=code and FOLLOWED, why=why)


class _Other(Nodes):
    """The view of every node but the first: it talks to node 0 alone."""

    def __init__(self, place: Place, offer: dict[str, Any]) -> None:
        self._place = place
        self._verdict: tuple[int, str] | None = None
        self._said_done = False
        _serve(place, {})
        self._connection = self._reach(offer)
        try:
            told = self._connection.receive()
        except LostError as error:
            raise NotTogetherError(f"{place.name(0)} went away before the start") from error
        if told["kind"] != "start":
            raise NotTogetherError(str(told.get("why")))
        self.plan = told["plan"]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def verdict(self) -> tuple[int, str] | None:
        return self._verdict

    def done(self) -> None:
        if not self._said_done:
            self._said_done = True
            self._send(kind="done")

    def fail(self, code: int, why: str) -> None:
        self._send(kind="failed", code=code, why=why)

    def close(self) -> None:
        self._connection.close()
        self._reader.join(_FLUSH_SECONDS)

    def _send(self, **message: Any) -> None:
        with suppress(LostError):  # the reading thread finds out
            self._connection.send(**message)

    def _reach(self, offer: dict[str, Any]) -> Connection:
        place = self._place
        deadline = time.monotonic() + place.wait_seconds
        while True:
            try:
                connection = Connection.make(place.hosts[0], place.port, place.token)
                connection.send(kind="join", node=place.node, offer=offer)
            except (OSError, LostError) as error:
                if time.monotonic() > deadline:
                    raise NotTogetherError(
                        f"{place.name(0)} could not be reached within {place.wait_seconds:g} seconds: {error}"
                    ) from error
                time.sleep(_RETRY_SECONDS)
            else:
                connection.keep_alive()
                return connection

    def _read(self) -> None:
        try:
            told = self._connection.receive()
            self.blamed_for = tuple(told.get("tail", ()))
            self._verdict = int(told["code"]), str(told["why"])
        except LostError:
            self._verdict = FOLLOWED, f"{self._place.name(0)} was lost"


def report_rank(place: Place, **report: Any) -> None:
    """Tell node 0 of a rank that has failed (``rank``, ``host``, ``code``, ``tail``), and wait until it knows.

    Raises:
        LostError: It is gone.
        OSError: It can't be reached.
    """
    connection = Connection.make(place.hosts[0], place.port, place.token)
    connection.send(kind="report", **report)
    connection.receive()
    connection.close()


def _serve(place: Place, handlers: Mapping[str, Callable[[Connection, Any], None]]) -> None:
    """Answer from now on: on every node who starts a command, and the kinds of messages that have a handler."""
    try:
        server = listen(place.port)
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        why = f"port {place.port} can't be listened on: {said}"
        raise OSError(error.errno, why) from error

    def answer(accepted: socket.socket) -> None:
        with suppress(LostError, OSError, KeyError, ValueError):
            connection = Connection.take(accepted, place.token)
            message = connection.receive()
            if message["kind"] == "shell":
                serve_shell(connection, str(message["command"]))
            elif message["kind"] in handlers:
                handlers[message["kind"]](connection, message)

    def accept() -> None:
        while server.fileno() >= 0:
            try:
                accepted, _ = server.accept()
            except (
                OSError
            ):  # there are too many open files, say: others are to be heard once there are fewer
                time.sleep(_RETRY_SECONDS)
                continue
            try:
                threading.Thread(target=answer, args=(accepted,), daemon=True).start()
            except RuntimeError:  # too many threads
                accepted.close()
                time.sleep(_RETRY_SECONDS)

    threading.Thread(target=accept, daemon=True).start()
