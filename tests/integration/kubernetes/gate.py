"""An HTTP proxy before a real API server, which refuses some requests, loses the answers of some, or is slow."""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml
from kubernetes import client, config

if TYPE_CHECKING:
    from pathlib import Path

_PIECE = 1 << 16
_END = b"\r\n\r\n"


@dataclass
class _Rule:
    method: str
    part: str
    times: float
    status: int | None

    def fits(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and self.part in path


class Gate:
    """The way to the API server. As a context it ends with its connections.

    Attributes:
        delay: Seconds that each answer takes on its way.
        asked: Method and path of each request.
    """

    def __init__(self, kubeconfig: Path, copy: Path) -> None:
        """Write a kubeconfig that leads through this gate to ``copy``."""
        known = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=known)
        server = urlsplit(known.host)
        self._server = (str(server.hostname), server.port or 443)
        self._tls = ssl.create_default_context(cafile=known.ssl_ca_cert)
        if known.cert_file:
            self._tls.load_cert_chain(known.cert_file, known.key_file)
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self.delay = 0.0
        self.asked: list[tuple[str, str]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        content = yaml.safe_load(kubeconfig.read_text())
        port = self._listener.getsockname()[1]
        content["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{port}"}
        copy.write_text(yaml.safe_dump(content))
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection; the next ones pass."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def refuse(self, method: str, part: str, status: int, *, times: float = 1) -> None:
        """Answer requests whose path has ``part`` in it with ``status``, so many times."""
        self._rules.append(_Rule(method, part, times, status))

    def lose(self, method: str, part: str, *, times: float = 1) -> None:
        """Let requests pass, but not their answers."""
        self._rules.append(_Rule(method, part, times, None))

    def heal(self) -> None:
        """Let everything pass."""
        self._rules.clear()

    def were_used(self) -> bool:
        """Return whether all rules were applied as often as they say."""
        return all(rule.times == 0 for rule in self._rules)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            head, body = _read_request(near)
            method, path = head.decode("latin-1").split(" ")[:2]
            self.asked.append((method, path))
            rule = self._find_rule(method, path)
            if rule is not None and rule.status is not None:
                near.sendall(_make_refusal(rule.status))
                return
            with (
                socket.create_connection(self._server) as raw,
                self._tls.wrap_socket(raw, server_hostname=self._server[0]) as far,
            ):
                if b"upgrade:" in head.lower():
                    far.sendall(head + body)
                    _splice(near, far)
                    return
                # So that each request comes by here, and each answer has an end.
                far.sendall(head.replace(_END, b"\r\nConnection: close" + _END) + body)
                while data := far.recv(_PIECE):
                    if rule is None:
                        time.sleep(self.delay)
                        near.sendall(data)

    def _find_rule(self, method: str, path: str) -> _Rule | None:
        with self._lock:
            for rule in self._rules:
                if rule.fits(method, path):
                    rule.times -= 1
                    return rule
        return None


def _read_request(near: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while _END not in data:
        piece = near.recv(_PIECE)
        if not piece:
            raise ConnectionError
        data += piece
    head, _, body = data.partition(_END)
    size = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            size = int(line.partition(b":")[2])
    while len(body) < size:
        body += near.recv(_PIECE)
    return head + _END, body


def _make_refusal(status: int) -> bytes:
    body = json.dumps({"kind": "Status", "message": "error dialing backend: of a test"}).encode()
    head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close{_END.decode()}".encode() + body


def _splice(near: socket.socket, far: ssl.SSLSocket) -> None:
    """Carry what comes from either side to the other one, in one thread: a TLS socket is not for two."""
    while True:
        ready = [far] if far.pending() else select.select([near, far], [], [])[0]
        for source in ready:
            data = source.recv(_PIECE)
            if not data:
                return
            (far if source is near else near).sendall(data)
