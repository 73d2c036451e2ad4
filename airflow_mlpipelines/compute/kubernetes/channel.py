"""Running a command in a container of a pod, with its three streams over one WebSocket.

The client's own ``WSClient`` waits with ``poll()`` for a socket whose data may have been decrypted
already, and so can wait beside an answer; and it connects without any limit of time. So the socket is opened and
read here, with a limit to silence.
"""

from __future__ import annotations

import json
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from airflow_mlpipelines.compute.kubernetes.cluster import (
    FORBIDDEN,
    UNAUTHORIZED,
    UNREACHABLE,
    ClusterError,
    locate,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kubernetes.client import Configuration

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

STDIN, STDOUT, STDERR = 0, 1, 2
_STATUS = 3
_PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_CONNECT_SECONDS = 30.0
_SILENCE_SECONDS = 60.0
_CHUNK = 128 << 10
_SHOWN = 500


class ChannelError(ClusterError):
    """There was no connection, or it broke: what the command has done is not to be relied on."""

    def __init__(self, message: str, *, status: int = UNREACHABLE) -> None:
        super().__init__(status, message)


class CommandError(ChannelError):
    """The command ended badly, or what it was to carry can't be carried: no connection is to blame."""


class Channel:
    """One running command. Use it as a context; at its end the connection is closed."""

    def __init__(
        self,
        cluster: Cluster,
        pod: str,
        container: str,
        command: Sequence[str],
        *,
        silence: float = _SILENCE_SECONDS,
    ) -> None:
        """Start the command.

        Raises:
            ChannelError: There is no such container running, or nobody answers.
        """
        words = [("container", container), *(("command", word) for word in command)]
        streams = [(name, "true") for name in ("stdin", "stdout", "stderr")]
        path = f"{locate(cluster.namespace, f'pods/{pod}/exec')}?{urlencode(words + streams)}"
        self._socket = cluster.with_credentials(lambda access: _connect(access, path))
        self._socket.settimeout(silence)
        self._said = b""
        self._status: dict[str, Any] | None = None

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        # Not WebSocket.close(), which waits for the other side to agree.
        self._socket.shutdown()

    @property
    def said(self) -> str:
        """What the command has written to stderr so far."""
        return self._said.decode("utf-8", "replace").strip()

    def write(self, data: bytes) -> None:
        """Write to the command's stdin.

        Raises:
            ChannelError: The connection broke.
        """
        from websocket import ABNF, WebSocketException

        view = memoryview(data)
        try:
            for start in range(0, len(data), _CHUNK):
                piece = bytes((STDIN,)) + view[start : start + _CHUNK]
                self._socket.send(piece, opcode=ABNF.OPCODE_BINARY)
        except (OSError, WebSocketException) as error:
            raise ChannelError(f"the connection broke: {error}") from error

    def read(self) -> Iterator[bytes]:
        """Yield what the command writes to stdout, until it ends.

        Raises:
            ChannelError: The connection broke before the command's end, or its end was a bad one.
        """
        from websocket import ABNF, WebSocketException

        while self._status is None:
            try:
                kind, frame = self._socket.recv_data_frame(True)
            except (OSError, WebSocketException) as error:
                raise ChannelError(f"the connection broke: {error}") from error
            if kind == ABNF.OPCODE_CLOSE:
                break
            if kind not in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) or not frame.data:
                continue
            channel, data = frame.data[0], bytes(frame.data[1:])
            if channel == STDOUT and data:
                yield data
            elif channel == STDERR:
                self._said += data
            elif channel == _STATUS and data:
                self._status = json.loads(data)
        if self._status is None:
            raise ChannelError(f"the connection was closed. {self.said[:_SHOWN]}")
        if self._status.get("status") != "Success":
            ended = self._status.get("reason") == "NonZeroExitCode"  # else it was not even begun
            kind = CommandError if ended else ChannelError
            raise kind(f"{self._status.get('message')}. {self.said[:_SHOWN]}")


def _connect(configuration: Configuration, path: str) -> Any:
    """Return an open connection to where the API server has ``path``.

    Raises:
        ChannelError: The API server refuses, or nobody answers.
    """
    from requests.utils import should_bypass_proxies
    from websocket import WebSocket, WebSocketBadStatusException, WebSocketException

    options: dict[str, Any] = {"timeout": _CONNECT_SECONDS, "subprotocols": list(_PROTOCOLS)}
    headers = {}
    for setting in configuration.auth_settings().values():
        if setting["in"] == "header" and setting["value"]:
            headers[setting["key"]] = setting["value"]
    options["header"] = headers
    host = str(configuration.host).rstrip("/")
    if configuration.proxy and not should_bypass_proxies(
        host, no_proxy=configuration.no_proxy or ""
    ):
        proxy = urlsplit(configuration.proxy)
        options |= {"http_proxy_host": proxy.hostname, "http_proxy_port": proxy.port}
        if proxy.username:
            options["http_proxy_auth"] = (proxy.username, proxy.password or "")
    socket: Any = WebSocket(sslopt=_security(configuration), skip_utf8_validation=True)
    try:
        socket.connect(f"ws{host.removeprefix('http')}{path}", **options)
    except WebSocketBadStatusException as error:
        socket.shutdown()
        # Any other refusal may be of the node's kubelet, and of this moment.
        kept = error.status_code if error.status_code in (UNAUTHORIZED, FORBIDDEN) else UNREACHABLE
        raise ChannelError(_refusal(error), status=kept) from error
    except (OSError, ValueError, WebSocketException) as error:
        socket.shutdown()
        raise ChannelError(f"no connection: {error}"[:_SHOWN]) from error
    return socket


def _security(configuration: Configuration) -> dict[str, Any]:
    """Return how the connection is to be secured, as the client secures its own."""
    if not configuration.verify_ssl:
        options: dict[str, Any] = {"cert_reqs": ssl.CERT_NONE, "check_hostname": False}
    else:
        options = {"cert_reqs": ssl.CERT_REQUIRED}
        if configuration.ssl_ca_cert:
            options["ca_certs"] = configuration.ssl_ca_cert
        if configuration.assert_hostname is False:
            options["check_hostname"] = False
    if configuration.cert_file:
        options |= {"certfile": configuration.cert_file, "keyfile": configuration.key_file}
    if configuration.tls_server_name:
        options["server_hostname"] = configuration.tls_server_name
    return options


def _refusal(error: Any) -> str:
    """Return what the API server says, without the HTTP around it."""
    try:
        said = str(json.loads(error.resp_body)["message"])
    except (TypeError, ValueError, KeyError):
        said = str(error)
    return said[:_SHOWN]
