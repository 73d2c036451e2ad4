"""A small HTTP server that answers as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    token: str | None


@dataclass
class AirflowServer:
    """Answers by method and path, each in turn; the last one for good. What it does not know is 404.

    Attributes:
        answers: ``"GET /path"`` -> pairs of status and body; a body is JSON, or text as it is.
        tokens: Tokens it accepts; None accepts every request.
        requests: All that it was asked.
    """

    answers: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    tokens: list[str] | None = None
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def asked(self, what: str) -> list[Request]:
        """Return the requests of this method and path, such as ``GET /api/v2/dags/flights``."""
        return [item for item in self.requests if f"{item.method} {item.path}" == what]

    def answer(self, request: Request) -> tuple[int, Any]:
        """Note a request and return the status and the body for it."""
        self.requests.append(request)
        is_login = request.path == "/auth/token"
        if self.tokens is not None and not is_login and request.token not in self.tokens:
            return 401, {"detail": "Invalid JWT token"}
        answers = self.answers.get(f"{request.method} {request.path}")
        if not answers:
            return 404, {"detail": "Not Found"}
        return answers.pop(0) if len(answers) > 1 else answers[0]


def _make_handler(server: AirflowServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            authorization = self.headers.get("Authorization")
            request = Request(
                self.command,
                unquote(address.path),
                dict(parse_qsl(address.query)),
                json.loads(content) if content else None,
                authorization.removeprefix("Bearer ") if authorization else None,
            )
            status, body = server.answer(request)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = _handle  # noqa: N815 - the names that http.server wants

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
