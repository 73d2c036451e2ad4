"""A TCP proxy that counts what passes, and at some byte breaks every connection, or holds it without a word."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Literal

_PIECE = 1 << 16


class BreakingProxy:
    """Stands before a server. As a context it ends with its connections.

    Attributes:
        up: Bytes that clients have sent.
        down: Bytes that they got.
        reached: Is set when the limit is.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.reached = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.heal()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> BreakingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._drop_all()

    def limit(self, way: Literal["up", "down"], size: int, then: Literal["drop", "hold"]) -> None:
        """Let so many bytes more pass in one direction, and then nothing in any, until it is healed."""
        self._limit, self._then = (way, getattr(self, way) + size), then

    def heal(self) -> None:
        """Let everything pass, and count from 0."""
        self._drop_all()
        self._limit: tuple[str, int] | None = None
        self._then = "drop"
        self.reached.clear()
        self.up = self.down = 0

    def _drop_all(self) -> None:
        with self._lock:
            dropped, self._open = self._open, set()
        for end in dropped:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.reached.is_set() and self._then == "drop":
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                with self._lock:
                    self._open |= {client, server}
                for way, source, target in (("up", client, server), ("down", server, client)):
                    words = (way, source, target)
                    threading.Thread(target=self._carry, args=words, daemon=True).start()

    def _carry(self, way: str, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                with self._lock:
                    passed = getattr(self, way) + len(piece)
                    limit = self._limit or (None, 0)
                    if limit[0] == way and passed > limit[1]:
                        self.reached.set()
                    broken = self.reached.is_set()
                    if not broken:
                        setattr(self, way, passed)
                if broken and self._then == "drop":
                    break
                if broken:
                    return  # and both ends wait
                target.sendall(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
