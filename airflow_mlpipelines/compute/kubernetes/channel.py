"""Running a command in a container of a pod, with its three streams over one WebSocket.

The client's own ``WSClient`` waits with ``poll()`` for a socket whose data may have been decrypted
already, and so can wait beside an answer; here its socket is read directly, with a limit to silence.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.cluster import UNREACHABLE, ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

STDIN, STDOUT, STDERR = 0, 1, 2
_STATUS = 3
_SILENCE_SECONDS = 60.0
_CHUNK = 128 << 10
_SHOWN = 500


class ChannelError(ClusterError):
    """The connection broke, or the command ended badly: what it has done is not to be relied on."""

    def __init__(self, message: str) -> None:
        super().__init__(UNREACHABLE, message)


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
        from kubernetes.client import ApiException, CoreV1Api
        from kubernetes.stream import stream

        # stream() changes the client while it connects: it gets one that no other thread uses.
        api = CoreV1Api(cluster.again().client)
        try:
            opened = stream(
                api.connect_get_namespaced_pod_exec,
                pod,
                cluster.namespace,
                container=container,
                command=list(command),
                stdin=True,
                stdout=True,
                stderr=True,
                tty=False,
                binary=True,
                _preload_content=False,
            )
        except (ApiException, AttributeError) as error:
            # The client trips over an error that came without a body.
            cause = error if isinstance(error, ApiException) else error.__context__
            raise ChannelError(str(getattr(cause, "reason", cause))[:_SHOWN]) from error
        self._socket: Any = opened.sock
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
            raise ChannelError(f"{self._status.get('message')}. {self.said[:_SHOWN]}")
