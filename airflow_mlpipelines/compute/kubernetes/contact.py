"""Letting the pods of a gang know that their worker is still there, on which their helpers look now and then."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from airflow_mlpipelines.compute.kubernetes.channel import Channel
from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
from airflow_mlpipelines.compute.kubernetes.gang import list_pods
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, STAGE
from airflow_mlpipelines.compute.kubernetes.watch import container_state

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

_CONTACT_SECONDS = 3600.0


class ContactKeeper:
    """Touches, every hour, what the helper of each pod of a gang looks at. A context.

    Without it, pods that wait for the others' places, or work for longer than
    :data:`~airflow_mlpipelines.compute.kubernetes.scripts.KEPT_MINUTES`, are taken for forgotten.
    """

    def __init__(self, cluster: Cluster, step_run_id: str) -> None:
        self._cluster = cluster.again()
        self._step_run_id = step_run_id
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(_CONTACT_SECONDS):
            with suppress(ClusterError):  # there is another time
                for pod in list_pods(self._cluster, self._step_run_id):
                    waits = container_state(pod, STAGE)[0] == "running"
                    self._touch(pod["metadata"]["name"], STAGE if waits else OUTPUTS_KEEPER)

    def _touch(self, pod: str, helper: str) -> None:
        command = ["touch", "control/contact"]
        with suppress(ClusterError), Channel(self._cluster, pod, helper, command) as channel:
            for _ in channel.read():
                pass
