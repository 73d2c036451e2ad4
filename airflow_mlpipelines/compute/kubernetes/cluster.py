"""The Kubernetes API: reaching it, asking it as plain JSON, and telling its refusals apart."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_mlpipelines.compute.kubernetes.access import Access, configure
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kubernetes.client import ApiClient, Configuration
    from urllib3.response import HTTPResponse

    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

Json = dict[str, Any]
Answer = TypeVar("Answer")
PATIENCE_SECONDS = 600.0
"""How long the API server may be away before a step gives up on it."""
CONNECT_SECONDS = 10.0
UNREACHABLE = 0
"""The status of an answer that never came."""
UNAUTHORIZED = 401
FORBIDDEN = 403
NOT_FOUND = 404
CONFLICT = 409
_API = {"jobs": "/apis/batch/v1"}
"""Where the API has what is not of its core."""
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_ANSWER_SECONDS = 30.0
_LONGEST_PAUSE = 2.0
_RENEWAL_SECONDS = 120.0
"""How long credentials that were taken once may be refused: whoever renews them may come late."""


class ClusterError(Exception):
    """The API server refused a request, or did not answer.

    Attributes:
        status: The HTTP status, or :data:`UNREACHABLE`.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later, with nothing changed."""
        return self.status in (UNREACHABLE, _TOO_MANY_REQUESTS) or self.status >= _SERVER_ERROR


class ClusterLostError(Exception):
    """The API server has not answered for longer than a step waits for it."""


class PodUnreachableError(ClusterLostError):
    """The API server answers, but for longer than a step waits, nothing got through to a pod that runs."""


class Cluster:
    """One thread's connection to the namespace of a compute."""

    def __init__(self, access: Access, *, hurried: bool = False) -> None:
        self.compute = access.compute
        self.namespace = access.compute.namespace
        self._access = access
        self._is_hurried = hurried
        self._client: tuple[Configuration, ApiClient] | None = None

    def again(self, *, hurried: bool = False) -> Cluster:
        """Return another connection to the same, for another thread or a signal handler.

        With ``hurried``, the client does not by itself ask again where an answer is late.
        """
        return Cluster(self._access, hurried=hurried)

    @property
    def url(self) -> str:
        """Where the API server listens."""
        return str(self._access.configuration.host)

    def with_credentials(self, ask: Callable[[Configuration], Answer]) -> Answer:
        """Return what ``ask`` returns; where it is refused the credentials, it gets what they are by now.

        Raises:
            ClusterError: It is refused them still, or raises this by itself.
        """
        known = self._access.configuration
        try:
            answer = ask(known)
        except ClusterError as error:
            if error.status != UNAUTHORIZED:
                raise
            try:
                renewed = self._access.renew(known)
            except ComputeUnavailableError:
                raise error from None  # what was refused says more, and may be written anew right now
            answer = ask(renewed)
        self._access.was_granted = True
        return answer

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Json | None = None,
        seconds: float = _ANSWER_SECONDS,
    ) -> Json:
        """Return the answer's JSON.

        Args:
            method: Of HTTP. A ``PATCH`` is a merge patch.
            path: Below the namespace, such as ``pods/x``.
            query: The query's parameters.
            body: What to send as JSON.
            seconds: How long the answer may take.

        Raises:
            ClusterError: The API server refuses, or does not answer.
        """
        response = self._call(method, path, query, body, seconds)
        with _errors():
            answer: Json = json.loads(response.data)
        return answer

    def ask_patiently(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Json | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> Json:
        """Return the answer's JSON, however often it takes to ask: for what does no harm if it is done twice.

        Raises:
            ClusterLostError: The API server was away for longer than ``patience`` seconds.
            ClusterError: It refuses.
        """
        return self.patiently(
            lambda: self.ask(method, path, query=query, body=body), patience=patience
        )[0]

    @contextmanager
    def open(
        self, path: str, *, query: Mapping[str, Any], seconds: float
    ) -> Iterator[HTTPResponse]:
        """Give the answer to read from, as it comes; ``seconds`` of silence end it.

        Raises:
            ClusterError: The API server refuses, or the connection breaks.
        """
        response = self._call("GET", path, query, None, seconds)
        with _errors():
            try:
                yield response
            finally:
                response.close()

    def find(self, kind: str, name: str) -> Json | None:
        """Return the object of this kind (``pods``, ``secrets``) and name, or None if there is none."""
        try:
            return self.ask("GET", f"{kind}/{name}")
        except ClusterError as error:
            if error.status == NOT_FOUND and f'"{name}"' in str(error):
                return None
            raise

    def find_patiently(self, kind: str, name: str, *, patience: float) -> tuple[Json | None, bool]:
        """Return the object, and whether the API server was away meanwhile.

        Raises:
            ClusterLostError: It was away for longer than ``patience`` seconds.
            ClusterError: It refuses.
        """
        return self.patiently(lambda: self.find(kind, name), patience=patience)

    def patiently(
        self, ask: Callable[[], Answer], *, patience: float = PATIENCE_SECONDS
    ) -> tuple[Answer, bool]:
        """Return what ``ask`` returns, however often it has to be called, and whether that was more than once.

        Raises:
            ClusterLostError: The API server was away for longer than ``patience`` seconds.
            ClusterError: It refuses.
        """
        waited = False
        pause = 0.1
        began = time.monotonic()
        while True:
            try:
                return ask(), waited
            except ClusterError as error:
                away = time.monotonic() - began
                if error.status == UNAUTHORIZED and self._access.was_granted:
                    if away > _RENEWAL_SECONDS:
                        raise
                elif not error.may_pass:
                    raise
                elif away > patience:
                    raise ClusterLostError(str(error)) from error
            waited = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def delete(self, kind: str, name: str, *, seconds: int, uid: str | None = None) -> None:
        """Have the object deleted; its processes get ``seconds`` to end. Gone is fine.

        Args:
            kind: Such as ``pods``.
            name: Its name.
            seconds: The grace of a pod.
            uid: Delete it only if it is this very one.

        Raises:
            ClusterError: The API server refuses, or does not answer.
        """
        body: Json = {"gracePeriodSeconds": seconds, "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            self.ask("DELETE", f"{kind}/{name}", body=body)
        except ClusterError as error:
            if error.status not in (NOT_FOUND, CONFLICT):
                raise

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: Json | None,
        seconds: float,
    ) -> HTTPResponse:
        headers = {"Accept": "application/json, */*"}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"

        def send(configuration: Configuration) -> HTTPResponse:
            with _errors():
                response: HTTPResponse = self._client_for(configuration).call_api(
                    locate(self.namespace, path),
                    method,
                    query_params=list((query or {}).items()),
                    header_params=headers,
                    body=body,
                    auth_settings=["BearerToken"],
                    _preload_content=False,
                    _return_http_data_only=True,
                    _request_timeout=(min(CONNECT_SECONDS, seconds), seconds),
                )
            return response

        return self.with_credentials(send)

    def _client_for(self, configuration: Configuration) -> ApiClient:
        from kubernetes.client import ApiClient

        if self._client is None or self._client[0] is not configuration:
            own = configuration
            if self._is_hurried:
                own = copy(configuration)
                own.retries = False
            self._client = configuration, ApiClient(configuration=own)
        return self._client[1]


def locate(namespace: str, path: str) -> str:
    """Return where the API server has what is asked for by a ``path`` below the namespace."""
    api = _API.get(path.partition("/")[0], "/api/v1")
    return f"{api}/namespaces/{namespace}/{path}"


def connect(compute: KubernetesComputeSpec) -> Cluster:
    """Return a connection to the compute's cluster; nothing is asked of it yet.

    Raises:
        ComputeUnavailableError: As :func:`~airflow_mlpipelines.compute.kubernetes.access.configure`.
    """
    return Cluster(Access(compute, configure(compute)))


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what the client raises into :class:`ClusterError`."""
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise ClusterError(int(error.status or UNREACHABLE), _message(error)) from error
    except (ConfigException, HTTPError, OSError, ValueError) as error:
        raise ClusterError(UNREACHABLE, str(error)) from error


def _message(error: Any) -> str:
    """Return what the API server says, without headers and JSON around it."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason or error.body or error)
