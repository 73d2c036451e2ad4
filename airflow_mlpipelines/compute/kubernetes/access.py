"""The way to a compute's cluster, and the credentials for it, which are renewed while a step runs."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from kubernetes.client import Configuration

    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

_configuring = threading.Lock()


class Access:
    """The address and credentials of a compute's cluster, for all connections of a process that have to do with a step.

    A token may end in the middle of a step of twelve hours, and another one is where it came from.

    Attributes:
        was_granted: Whether the API server has ever taken the credentials.
    """

    def __init__(self, compute: KubernetesComputeSpec, configuration: Configuration) -> None:
        self.compute = compute
        self.was_granted = False
        self._configuration = configuration
        self._renewing = threading.Lock()

    @property
    def configuration(self) -> Configuration:
        """What was read last."""
        return self._configuration

    def renew(self, refused: Configuration) -> Configuration:
        """Return what the cluster may take instead of ``refused``: what others have read since, or what is read now.

        Raises:
            ComputeUnavailableError: There is nothing to read.
        """
        with self._renewing:
            if self._configuration is refused:
                self._configuration = configure(self.compute)
            return self._configuration


def configure(compute: KubernetesComputeSpec) -> Configuration:
    """Return the addresses and credentials of the compute's cluster, as they are now.

    By its Airflow connection if it names one; else from inside the cluster, or by ``$KUBECONFIG`` or
    ``~/.kube/config``, as ``in_cluster`` says, or whichever is there.

    Raises:
        ComputeUnavailableError: There is no such connection or configuration.
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
    from yaml import YAMLError

    # The last two of a file that somebody is just writing.
    return (
        ConfigException,
        AirflowException,
        AirflowRuntimeError,
        OSError,
        ValueError,
        YAMLError,
    )
