"""The life of one step run's container: made or adopted, followed to its end, removed."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import STEP_RUN_LABEL
from airflow_mlpipelines.compute.docker.container import make_container, prepare_directories
from airflow_mlpipelines.compute.docker.daemon import (
    connect,
    daemon_url,
    end_container,
    find_container,
    find_start,
    is_name_taken,
    remove_container,
    stop_container,
    unreachable,
)
from airflow_mlpipelines.compute.docker.failures import end_failure, start_failure
from airflow_mlpipelines.compute.docker.gpu_claims import claim_gpus
from airflow_mlpipelines.compute.docker.logs import LogFollower
from airflow_mlpipelines.compute.docker.watch import (
    ALIVE,
    ENDED,
    ContainerEnd,
    DaemonLostError,
    watch_container,
)
from airflow_mlpipelines.compute.stopped import ran_too_long, was_killed
from airflow_mlpipelines.compute.time_limits import enforce_timeout
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit, HandleStore, StepLaunch
    from airflow_mlpipelines.compute.docker.container import ContainerSpec
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

log = logging.getLogger(__name__)


class ContainerAttendant:
    """Sees one step run through in one container. One instance serves one try."""

    def __init__(
        self,
        client: APIClient,
        compute: DockerComputeSpec,
        launch: StepLaunch,
        *,
        handle: HandleStore,
        is_killed: Callable[[], bool],
    ) -> None:
        """Prepare; nothing is asked of the daemon yet.

        Args:
            client: The connection of the thread that calls :meth:`run`.
            compute: Where the daemon is, and which GPUs it hands out.
            launch: The step run.
            handle: Remembers the container.
            is_killed: Whether somebody has stopped the step.
        """
        self._client = client
        self._compute = compute
        self._launch = launch
        self._handle = handle
        self._is_killed = is_killed
        self._expired = False

    def run(self, spec: ContainerSpec, emit: Emit) -> ContainerEnd:
        """Return how the container ended; it is removed then.

        One of an earlier try is adopted, with its whole log.

        Raises:
            StepFailedError: It did not start, or was killed before.
            ComputeUnavailableError: The daemon does not answer. A container that runs is left alone, for the
                next try to adopt.
        """
        survivor = find_survivor(self._client, spec.name, self._handle)
        with claim_gpus(
            self._client,
            self._compute,
            self._launch,
            [spec.name],
            adopted=None if survivor is None else [survivor],
            emit=emit,
            cancelled=self._is_killed,
        ) as claim:
            if survivor is None:
                container = self._start(replace(spec, gpu_ids=claim.ids))
                claim.started()
            else:
                container = str(survivor["Id"])
                log.info("Adopting container %s of an earlier try, with its log so far:", spec.name)
            return self._attend(container, emit)

    def check(self, spec: ContainerSpec, end: ContainerEnd, log_tail: tuple[str, ...]) -> None:
        """Return if the container ended well.

        Raises:
            StepFailedError: It did not.
            ComputeUnavailableError: The daemon went away, and the container with it.
        """
        step = self._launch.step_name
        code = end.state["ExitCode"] if end.state is not None else None
        if self._is_killed():
            raise was_killed(self._launch, log_tail)
        if self._expired:
            raise ran_too_long(self._launch, code, log_tail)
        if code != 0:
            raise end_failure(step, end, spec, daemon_url(self._compute), log_tail)

    def _start(self, spec: ContainerSpec) -> str:
        """Return the id of the started container; whatever fails on the way leaves none."""
        from docker.errors import APIError

        client, launch, handle = self._client, self._launch, self._handle
        uid = prepare_directories(client, launch, spec)
        try:
            container = make_container(spec, client, uid=uid)
            # Noted before it starts: whatever runs can be found again.
            handle.set({"launcher": "docker", "container": container})
            if not self._is_killed():  # a kill before now may have found no container
                client.start(container)
                return container
        except APIError as error:
            if not is_name_taken(error):
                self._discard(spec.name)
                handle.set(None)
            if not self._is_killed():  # else it was removed before it could start
                raise start_failure(
                    launch.step_name, error, spec, daemon_url(self._compute)
                ) from error
        except BaseException:
            self._discard(spec.name)
            raise
        self._discard(spec.name)
        raise was_killed(launch)

    def _attend(self, container: str, emit: Emit) -> ContainerEnd:
        """Return how the container ended; it is removed then."""
        client, handle, over = self._client, self._handle, threading.Event()
        enforce_timeout(
            self._launch.timeout_seconds,
            over,
            find_start=lambda: find_start(self._compute, container),
            end=lambda: self._end_late(container),
        )
        try:
            end = watch_container(client, container, LogFollower(client, container, emit))
        except DaemonLostError as error:
            raise unreachable(self._compute, str(error)) from error
        except BaseException:  # above all a timeout or an interrupt, which Airflow raises in here
            with suppress(ComputeUnavailableError, OSError):
                end_container(connect(self._compute), container)
            handle.set(None)
            raise
        finally:
            over.set()
        self._discard(container)
        handle.set(None)
        return end

    def _end_late(self, container: str) -> None:
        self._expired = True
        stop_container(connect(self._compute), container)

    def _discard(self, container: str) -> None:
        """Remove a container whose end was read. If that fails the next one of this name does it."""
        try:
            remove_container(self._client, container)
        except OSError as error:  # docker's and requests' errors are OSErrors
            log.warning("Container %s could not be removed: %s", container, error)


def find_survivor(
    client: APIClient, step_run_id: str, handle: HandleStore
) -> Mapping[str, Any] | None:
    """Return the container of an earlier try to adopt; remove what is not to be adopted.

    A container that ended is adopted only while the handle says that nobody has read its end.
    """
    found = find_container(client, step_run_id)
    if found is None or not is_ours(found, step_run_id):
        return None
    noted = (handle.get() or {}).get("container")
    status = found["State"]["Status"]
    if (status in ALIVE and noted in (None, found["Id"])) or (
        status in ENDED and noted == found["Id"]
    ):
        return found
    log.info("Removing container %s, which an earlier try left behind (%s)", step_run_id, status)
    remove_container(client, found["Id"])
    return None


def is_ours(container: Mapping[str, Any] | None, step_run_id: str) -> bool:
    """Return whether it is there, and is a container of the step run."""
    labels = (container or {}).get("Config", {}).get("Labels") or {}
    return bool(labels.get(STEP_RUN_LABEL) == step_run_id)
