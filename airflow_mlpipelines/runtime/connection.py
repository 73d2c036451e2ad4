"""A connection between two nodes of a gang: whoever talks on it knows the gang's token.

Messages are JSON objects, one a line. Each side proves that it has the token by an HMAC of what both have
made up for this connection: the token itself is never sent.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

ALIVE = "alive"
_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 120.0
_HANDSHAKE_SECONDS = 20.0
_LONGEST_MESSAGE = 1 << 20
_NONCE_BYTES = 16
_MAKER, _TAKER = "maker", "taker"


class LostError(Exception):
    """The other side is gone, silent for two minutes, or does not have the token."""


class Connection:
    """Messages to and from another node. Any thread may send; one thread receives."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._file = connected.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()
        connected.settimeout(_HANDSHAKE_SECONDS)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def make(cls, host: str, port: int, token: str) -> Connection:
        """Return a connection to a node.

        Raises:
            LostError: The node is not the gang's.
            OSError: It can't be reached (yet).
        """
        made = cls(socket.create_connection((host, port), timeout=_HANDSHAKE_SECONDS))
        try:
            made._prove(token, _MAKER, _TAKER)
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def take(cls, accepted: socket.socket, token: str) -> Connection:
        """Return the connection that another node has made.

        Raises:
            LostError: It is none of the gang's.
        """
        taken = cls(accepted)
        try:
            taken._prove(token, _TAKER, _MAKER)
        except BaseException:
            taken.close()
            raise
        return taken

    def keep_alive(self) -> None:
        """Send a sign of life every five seconds from now on."""
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, **message: Any) -> None:
        """Send a message.

        Raises:
            LostError: The other side is gone.
        """
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            raise LostError(str(error)) from error

    def receive(self) -> dict[str, Any]:
        """Return the next message that is more than a sign of life.

        Raises:
            LostError: The other side is gone.
        """
        while True:
            try:
                line = self._file.readline(_LONGEST_MESSAGE)
                message = json.loads(line) if line.endswith(b"\n") else None
            except (OSError, ValueError) as error:
                raise LostError(str(error)) from error
            if not isinstance(message, dict):
                raise LostError("the connection was closed")
            if message.get("kind") != ALIVE:
                return message

    def close(self) -> None:
        """Send no more. What was sent still arrives: the other side closes when it has read it."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _prove(self, token: str, own: str, other: str) -> None:
        mine = secrets.token_hex(_NONCE_BYTES)
        self.send(nonce=mine)
        theirs = str(self.receive().get("nonce"))
        self.send(proof=_proof(token, own, mine, theirs))
        proof = str(self.receive().get("proof"))
        if theirs == mine or not hmac.compare_digest(proof, _proof(token, other, theirs, mine)):
            raise LostError("the other side does not have this gang's token")
        self._socket.settimeout(_SILENCE_SECONDS)

    def _beat(self) -> None:
        with suppress(LostError):
            while not self._closed.wait(_BEAT_SECONDS):
                self.send(kind=ALIVE)


def _proof(token: str, side: str, first: str, second: str) -> str:
    return hmac.new(token.encode(), f"{side} {first} {second}".encode(), "sha256").hexdigest()


def listen(port: int) -> socket.socket:
    """Return a socket that listens on all of this machine's addresses."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # where IPv6 is switched off
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
    return socket.create_server(("", port), backlog=128)
