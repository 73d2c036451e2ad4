"""The Kubernetes API for a trigger, of which hundreds share one thread: nothing in here waits but for ``await``.

The credentials are found as a worker finds them, by the client's own configuration, in a thread beside the loop.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from airflow_mlpipelines.compute.kubernetes.access import configure
from airflow_mlpipelines.compute.kubernetes.cluster import (
    CONFLICT,
    CONNECT_SECONDS,
    NOT_FOUND,
    UNAUTHORIZED,
    UNREACHABLE,
    ClusterError,
    locate,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from types import TracebackType

    from aiohttp import ClientResponse, ClientSession
    from kubernetes.client import Configuration

    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

Json = dict[str, Any]
_ANSWER_SECONDS = 30.0
_CHUNK = 16 << 10
_EXEC_PROTOCOL = "v4.channel.k8s.io"


class AsyncCluster:
    """A connection to the namespace of a compute. Use it as a context."""

    def __init__(self, compute: KubernetesComputeSpec) -> None:
        self.namespace = compute.namespace
        self._compute = compute
        self._configuration: Configuration | None = None
        self._session: ClientSession | None = None
        self._options: dict[str, Any] = {}
        self._clock: tuple[datetime, float] | None = None
        self._renewing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Find the cluster and the credentials; nothing is asked of it yet.

        Raises:
            ComputeUnavailableError: There is no such connection or configuration on this machine.
        """
        from aiohttp import ClientSession, TCPConnector

        await self._configure()
        # One for good: it knows no credentials, so that others may use it while they are renewed.
        self._session = ClientSession(connector=TCPConnector(limit=0))
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    def now(self) -> datetime:
        """Return the time by the API server's clock, as it has told it last."""
        if self._clock is None:
            return datetime.now(UTC)
        told, at = self._clock
        return told + timedelta(seconds=time.monotonic() - at)

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
    ) -> Json:
        """Return the answer's JSON; ``path`` is below the namespace.

        Raises:
            ClusterError: The API server refuses, or does not answer.
        """
        response = await self._request(method, path, query, body, _ANSWER_SECONDS)
        with _errors():
            async with response:
                answer: Json = await response.json(content_type=None)
        return answer

    @asynccontextmanager
    async def open(
        self, path: str, *, query: Mapping[str, str], silence: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Give the pieces of an answer as they come; so many seconds of ``silence`` break it.

        Raises:
            ClusterError: The API server refuses, or the connection breaks.
        """
        response = await self._request("GET", path, query, None, silence)
        try:
            yield _pieces(response)
        finally:
            response.close()

    async def delete(self, kind: str, name: str, *, seconds: int, uid: str | None = None) -> None:
        """Have the object deleted; its processes get ``seconds`` to end. Gone is fine.

        Raises:
            ClusterError: The API server refuses, or does not answer.
        """
        body: Json = {"gracePeriodSeconds": seconds, "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            await self.ask("DELETE", f"{kind}/{name}", body=body)
        except ClusterError as error:
            if error.status not in (NOT_FOUND, CONFLICT):
                raise

    async def execute(self, pod: str, container: str, command: Sequence[str]) -> None:
        """Run a short command in a container; what it prints is lost.

        Raises:
            ClusterError: There is no such container running, or nobody answers.
        """
        query = [("container", container), ("stdout", "true"), ("stderr", "true")]
        query += [("command", word) for word in command]
        headers = await asyncio.to_thread(self._headers)
        with _errors():
            async with self._open_session.ws_connect(
                self._url(f"pods/{pod}/exec"),
                params=query,
                headers=headers,
                protocols=(_EXEC_PROTOCOL,),
                **self._options,
            ) as socket:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    async for _ in socket:
                        pass

    @property
    def _open_session(self) -> ClientSession:
        if self._session is None or self._session.closed:
            raise ClusterError(UNREACHABLE, "not connected")
        return self._session

    def _url(self, path: str) -> str:
        host = str(self._configuration.host) if self._configuration is not None else ""
        return f"{host.rstrip('/')}{locate(self.namespace, path)}"

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Json | None,
        silence: float,
    ) -> ClientResponse:
        known = self._configuration
        response = await self._send(method, path, query, body, silence)
        if response.status == UNAUTHORIZED:  # a token may have been renewed where it came from
            response.close()
            async with self._renewing:
                if self._configuration is known:  # else somebody has read it anew meanwhile
                    await self._configure()
            response = await self._send(method, path, query, body, silence)
        told = response.headers.get("Date")
        if told is not None:
            self._clock = (parsedate_to_datetime(told).astimezone(UTC), time.monotonic())
        if response.ok:
            return response
        with _errors():
            async with response:
                raise ClusterError(response.status, _message(await response.text()))

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Json | None,
        silence: float,
    ) -> ClientResponse:
        from aiohttp import ClientTimeout

        headers = await asyncio.to_thread(self._headers)
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        with _errors():
            return await self._open_session.request(
                method,
                self._url(path),
                params=dict(query or {}),
                json=body,
                headers=headers,
                timeout=ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence),
                **self._options,
            )

    async def _configure(self) -> None:
        """Find the cluster and the credentials; what others send meanwhile has those that were known before."""
        configuration = await asyncio.to_thread(configure, self._compute)
        options = await asyncio.to_thread(_options, configuration)
        self._configuration, self._options = configuration, options

    def _headers(self) -> dict[str, str]:
        """Return the credentials. A token that changes is read anew by the client's own hook."""
        headers = {"Accept": "application/json, */*"}
        if self._configuration is not None:
            for setting in self._configuration.auth_settings().values():
                if setting["in"] == "header" and setting["value"]:
                    headers[setting["key"]] = setting["value"]
        return headers


def _options(configuration: Configuration) -> dict[str, Any]:
    """Return how a request to the cluster is to be sent."""
    from requests.utils import should_bypass_proxies

    url = urlsplit(configuration.host)
    options: dict[str, Any] = {}
    if url.scheme == "https":
        context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
        if not configuration.verify_ssl:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif configuration.assert_hostname is False:
            context.check_hostname = False
        if configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file or None)
        options["ssl"] = context
        if configuration.tls_server_name:
            options["server_hostname"] = configuration.tls_server_name
    if configuration.proxy and not should_bypass_proxies(
        configuration.host, no_proxy=configuration.no_proxy or ""
    ):
        options["proxy"] = configuration.proxy
    return options


async def _pieces(response: ClientResponse) -> AsyncIterator[bytes]:
    with _errors():
        while data := await response.content.read(_CHUNK):
            yield data


class _errors:  # noqa: N801 - used as a statement
    """Turns what the transport raises into :class:`ClusterError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        from aiohttp import ClientError

        if isinstance(error, ClientError | OSError | ValueError):  # TimeoutError is an OSError
            raise ClusterError(UNREACHABLE, f"{type(error).__name__}: {error}") from error


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text
