"""The Kubernetes API: reaching it, asking it as plain JSON, and telling its refusals apart."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kubernetes.client import ApiClient, Configuration
    from urllib3.response import HTTPResponse

    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

Json = dict[str, Any]
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
_configuring = threading.Lock()


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

    def __init__(self, compute: KubernetesComputeSpec, configuration: Configuration) -> None:
        from kubernetes.client import ApiClient

        self.compute = compute
        self.namespace = compute.namespace
        self._configuration = configuration
        self._client: ApiClient = ApiClient(configuration=configuration)

    def again(self) -> Cluster:
        """Return another connection to the same, for another thread or a signal handler."""
        return Cluster(self.compute, self._configuration)

    @property
    def url(self) -> str:
        """Where the API server listens."""
        return str(self._configuration.host)

    @property
    def client(self) -> ApiClient:
        """The client behind it."""
        return self._client

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
        with _errors():
            response = self._call(method, path, query, body, seconds)
            answer: Json = json.loads(response.data)
        return answer

    @contextmanager
    def open(
        self, path: str, *, query: Mapping[str, Any], seconds: float
    ) -> Iterator[HTTPResponse]:
        """Give the answer to read from, as it comes; ``seconds`` of silence end it.

        Raises:
            ClusterError: The API server refuses, or the connection breaks.
        """
        with _errors():
            response = self._call("GET", path, query, None, seconds)
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
        waited = False
        pause = 0.1
        deadline = time.monotonic() + patience
        while True:
            try:
                return self.find(kind, name), waited
            except ClusterError as error:
                if not error.may_pass:
                    raise
                if time.monotonic() > deadline:
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
        response: HTTPResponse = self._client.call_api(
            locate(self.namespace, path),
            method,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(CONNECT_SECONDS, seconds),
        )
        return response


def locate(namespace: str, path: str) -> str:
    """Return where the API server has what is asked for by a ``path`` below the namespace."""
    api = _API.get(path.partition("/")[0], "/api/v1")
    return f"{api}/namespaces/{namespace}/{path}"


def connect(compute: KubernetesComputeSpec) -> Cluster:
    """Return a connection to the compute's cluster; nothing is asked of it yet.

    By its Airflow connection if it names one; else from inside the cluster, or by ``$KUBECONFIG`` or
    ``~/.kube/config``, as ``in_cluster`` says, or whichever is there.

    Raises:
        ComputeUnavailableError: There is no such connection or configuration.
    """
    return Cluster(compute, configure(compute))


def configure(compute: KubernetesComputeSpec) -> Configuration:
    """Return the addresses and credentials of the compute's cluster, as they are now.

    Raises:
        ComputeUnavailableError: As :func:`connect`.
    """
    try:
        with _configuring:  # the client keeps its defaults in one place for all threads
            return _configuration(compute)
    except _configuration_errors() as error:
        raise ComputeUnavailableError(
            f"compute {compute.name!r}: no way to its Kubernetes cluster is known here: {error}. Name an "
            "Airflow connection of type kubernetes with conn_id=, let KUBECONFIG name a file, or run the "
            "worker inside the cluster with a service account."
        ) from error


def _configuration(compute: KubernetesComputeSpec) -> Configuration:
    if compute.conn_id is not None:
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook

        hook = KubernetesHook(conn_id=compute.conn_id, in_cluster=compute.in_cluster)
        configured: Configuration = hook.api_client.configuration
        return configured
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

    configuration = Configuration()
    if compute.in_cluster is not False:
        try:
            load_incluster_config(client_configuration=configuration)
        except ConfigException:
            if compute.in_cluster:
                raise
        else:
            return configuration
    # Named, as the client itself looks at the variable only once, when it is imported.
    load_kube_config(
        config_file=os.environ.get("KUBECONFIG") or None, client_configuration=configuration
    )
    return configuration


def _configuration_errors() -> tuple[type[Exception], ...]:
    from airflow.sdk.exceptions import AirflowException, AirflowRuntimeError
    from kubernetes.config import ConfigException

    return (ConfigException, AirflowException, AirflowRuntimeError, OSError)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what the client raises into :class:`ClusterError`."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise ClusterError(int(error.status or UNREACHABLE), _message(error)) from error
    except (HTTPError, OSError, ValueError) as error:
        raise ClusterError(UNREACHABLE, str(error)) from error


def _message(error: Any) -> str:
    """Return what the API server says, without headers and JSON around it."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason or error.body or error)
