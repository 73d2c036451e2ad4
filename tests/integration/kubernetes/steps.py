"""Steps on a real cluster, for tests: what they make there, seen through the plain client."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from airflow_mlpipelines.compute.kubernetes.pod import pod_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMAGE = "python:3.11-slim"
WAIT_SECONDS = 60.0


def make_api(kubeconfig: Any) -> Any:
    """Return the plain client of a cluster."""
    from kubernetes import client, config

    configuration = client.Configuration()
    config.load_kube_config(str(kubeconfig), client_configuration=configuration)
    return client.CoreV1Api(client.ApiClient(configuration))


class Look:
    """What there is of one step run on the cluster."""

    def __init__(self, kubeconfig: Any, namespace: str, step_run_id: str) -> None:
        self._kubeconfig = kubeconfig
        self.namespace = namespace
        self.name = pod_name(step_run_id)
        self._selector = f"airflow-mlpipelines.step_run={step_run_id}"

    @property
    def api(self) -> Any:
        return make_api(self._kubeconfig)

    def pods(self) -> list[Any]:
        """Every pod of the step run, however it stands."""
        return self.api.list_namespaced_pod(self.namespace, label_selector=self._selector).items

    def secrets(self) -> list[Any]:
        """Every Secret of the step run."""
        return self.api.list_namespaced_secret(self.namespace, label_selector=self._selector).items

    def pod(self) -> Any:
        """The only pod."""
        pods = self.pods()
        assert len(pods) == 1, pods
        return pods[0]

    def step_state(self) -> Any:
        """The state of the step's container, or None if it has none yet."""
        for pod in self.pods():
            for status in pod.status.container_statuses or ():
                if status.name == "step":
                    return status.state
        return None

    def is_running(self) -> bool:
        """Whether the step's program is running."""
        state = self.step_state()
        return state is not None and state.running is not None

    def execute(self, *command: str) -> str:
        """Return what a command prints in the helper beside the step."""
        from kubernetes.stream import stream

        return str(
            stream(
                self.api.connect_get_namespaced_pod_exec,
                self.name,
                self.namespace,
                container="outputs",
                command=list(command),
                stdout=True,
                stderr=True,
                stdin=False,
                tty=False,
            )
        )

    def remove(self) -> list[str]:
        """Remove what a test has left, and return it: the pods that nobody had told to go, and the Secrets."""
        left = []
        for pod in self.pods():
            if pod.metadata.deletion_timestamp is None:
                left.append(f"pod {pod.metadata.name}")
            with suppress_absent():
                self.api.delete_namespaced_pod(
                    pod.metadata.name, self.namespace, grace_period_seconds=0
                )
        wait_until(lambda: not self.pods(), "the pods are gone")
        for secret in self.secrets():
            left.append(f"secret {secret.metadata.name}")
            with suppress_absent():
                self.api.delete_namespaced_secret(secret.metadata.name, self.namespace)
        return left


@contextmanager
def suppress_absent() -> Iterator[None]:
    """Go on where what was to be deleted has gone by itself in the meantime."""
    from kubernetes.client import ApiException

    try:
        yield
    except ApiException as error:
        if error.status != 404:
            raise


@contextmanager
def own_namespace(kubeconfig: Any, **labels: str) -> Iterator[str]:
    """Give the name of a namespace that nobody else uses, with its default service account."""
    api = make_api(kubeconfig)
    name = f"mlp-test-{uuid.uuid4().hex[:8]}"
    api.create_namespace({"metadata": {"name": name, "labels": labels}})
    try:
        wait_until(lambda: api.list_namespaced_service_account(name).items, "its account is there")
        yield name
    finally:
        api.delete_namespace(name)


class Wire:
    """A way to the API server that a test can cut."""

    def __init__(self, kubeconfig: Path, copy: Path) -> None:
        """Write a kubeconfig that leads through this wire to ``copy``."""
        config = yaml.safe_load(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        server = urlsplit(cluster["server"])
        self._target = (server.hostname, server.port or 443)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._is_cut = False
        cluster["server"] = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        cluster["tls-server-name"] = "kubernetes"
        copy.write_text(yaml.safe_dump(config))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, seconds: float) -> None:
        """Break every connection, and let none through for a while."""
        self._is_cut = True
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._is_cut = False

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Callable[[], Any], what: str, *, seconds: float = WAIT_SECONDS) -> Any:
    """Return the condition's first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:g} s in vain until {what}")
