"""The life of a gang of containers under one try: started or adopted, watched, ended, and told of in words."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.docker.daemon import (
    connect,
    daemon_url,
    find_container,
    find_start,
    unreachable,
)
from airflow_mlpipelines.compute.docker.failures import end_failure
from airflow_mlpipelines.compute.docker.gang import (
    find_survivors,
    node_names,
    plan_nodes,
    remove_nodes,
    start_nodes,
    stop_nodes,
)
from airflow_mlpipelines.compute.docker.gpu_claims import claim_gpus
from airflow_mlpipelines.compute.docker.logs import LogFollower
from airflow_mlpipelines.compute.docker.watch import ContainerEnd, DaemonLostError, watch_container
from airflow_mlpipelines.compute.gang_logs import GangLogs
from airflow_mlpipelines.compute.stopped import ran_too_long, was_killed
from airflow_mlpipelines.compute.time_limits import enforce_timeout
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from airflow_mlpipelines.runtime.nodes import FOLLOWED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit, HandleStore, StepLaunch
    from airflow_mlpipelines.compute.docker.container import ContainerSpec
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

log = logging.getLogger(__name__)

_FOLLOW_SECONDS = 15.0
"""What the other nodes have to end by themselves after the first that failed."""
_KILL_TIMEOUT = 1
_LOG_END_SECONDS = 0.4


class GangRun:
    """One try's containers on several nodes. ``kill`` may be called at any time, from any thread."""

    def __init__(self, launch: StepLaunch, compute: DockerComputeSpec) -> None:
        self._launch = launch
        self._compute = compute
        self._killed = False
        self._expired = False
        self._over = threading.Event()

    def run(
        self, client: APIClient, spec: ContainerSpec, *, emit: Emit, handle: HandleStore
    ) -> None:
        """Run all nodes to their end, or adopt those of an earlier try.

        Raises:
            StepFailedError: They did not start, or one ended with another exit code than 0.
            ComputeUnavailableError: The daemon does not answer. What runs is left alone, to be adopted.
        """
        launch = self._launch
        try:
            containers = find_survivors(client, launch.step_run_id, handle)
            with claim_gpus(
                client,
                self._compute,
                launch,
                node_names(spec, launch),
                adopted=None
                if containers is None
                else [find_container(client, each) for each in containers],
                emit=emit,
                cancelled=lambda: self._killed,
            ) as claim:
                specs = plan_nodes(spec, launch, claim.ids)
                if containers is None:
                    if self._killed:
                        raise was_killed(self._launch)
                    containers = start_nodes(client, launch, specs, handle, self._compute)
                    log.info("%s containers on network %s", len(containers), spec.name)
                else:
                    log.info(
                        "Adopting %s containers of an earlier try, with their log:", len(specs)
                    )
                claim.started()
                if self._killed:  # a kill before now may have found no container
                    stop_nodes(self._compute, launch.step_run_id)
                logs = self._attend(client, containers, emit, handle)
        finally:
            self._over.set()
        self._check(specs, logs)

    def kill(self) -> None:
        """End all containers and remove them: two seconds after SIGTERM, nothing in them is left."""
        self._killed = True
        # What fails here, run() finds out; and what is left, the next try removes.
        with suppress(ComputeUnavailableError, OSError):
            stop_nodes(self._compute, self._launch.step_run_id, timeout=_KILL_TIMEOUT)
            # A log that is followed does not end if its container goes at once.
            self._over.wait(_LOG_END_SECONDS)
            remove_nodes(connect(self._compute, timeout=_KILL_TIMEOUT), self._launch.step_run_id)

    def _attend(
        self, client: APIClient, containers: Sequence[str], emit: Emit, handle: HandleStore
    ) -> GangLogs[ContainerEnd]:
        """Return the logs with all nodes' ends; the containers are removed then."""
        launch = self._launch
        over = threading.Event()
        enforce_timeout(
            launch.timeout_seconds,
            over,
            find_start=lambda: find_start(self._compute, containers[0]),
            end=self._end_late,
        )
        logs = GangLogs([partial(self._watch, container) for container in containers], emit)
        try:
            self._await_all(logs, len(containers))
        except DaemonLostError as error:
            raise unreachable(self._compute, str(error)) from error
        except BaseException:  # above all a timeout or an interrupt, which Airflow raises in here
            with suppress(ComputeUnavailableError, OSError):
                stop_nodes(self._compute, launch.step_run_id)
                remove_nodes(connect(self._compute), launch.step_run_id)
            handle.set(None)
            raise
        finally:
            over.set()
            logs.close()
        try:
            remove_nodes(client, launch.step_run_id)
        except OSError as error:  # docker's and requests' errors are OSErrors
            log.warning("Containers of %s could not be removed: %s", launch.step_run_id, error)
        handle.set(None)
        return logs

    def _watch(self, container: str, emit: Emit) -> ContainerEnd:
        client = connect(self._compute)
        return watch_container(client, container, LogFollower(client, container, emit))

    def _await_all(self, logs: GangLogs[ContainerEnd], count: int) -> None:
        """Hand on the logs until all nodes have ended; where one has failed, none outlives it for long."""
        deadline: float | None = None
        while len(logs.ends) < count:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended = logs.follow(left)
            if ended is None:
                with suppress(ComputeUnavailableError, OSError):
                    stop_nodes(self._compute, self._launch.step_run_id)
                deadline = (
                    time.monotonic() + _FOLLOW_SECONDS
                )  # a daemon that was away is asked again
            elif _code(ended[1]) != 0 and deadline is None and len(logs.ends) < count:
                deadline = time.monotonic() + _FOLLOW_SECONDS

    def _end_late(self) -> None:
        self._expired = True
        stop_nodes(self._compute, self._launch.step_run_id)

    def _check(self, specs: Sequence[ContainerSpec], logs: GangLogs[ContainerEnd]) -> None:
        """Return if all nodes ended well.

        Raises:
            StepFailedError: One did not: the one that the others followed.
            ComputeUnavailableError: The daemon went away, and the containers with it.
        """
        launch = self._launch
        node = find_culprit(logs.ends)
        if self._killed:
            raise was_killed(self._launch, tuple(logs.tails[0]))
        if self._expired:
            raise ran_too_long(launch, _code(logs.ends[0]), tuple(logs.tails[0]))
        if node is not None:
            logs.retell(node)
            error = end_failure(
                launch.step_name,
                logs.ends[node],
                specs[node],
                daemon_url(self._compute),
                tuple(logs.tails[node]),
            )
            where = f"node {node} of {len(specs)}"
            raise error.at(where) if isinstance(error, StepFailedError) else error


def find_culprit(ends: Mapping[int, ContainerEnd]) -> int | None:
    """Return the node that failed first, as far as ends tell; None if all ended well.

    A node that lacked memory, or that somebody removed, is to blame for others; one that was ended because
    of another node is not, if there is any such.
    """
    failed = sorted(node for node, end in ends.items() if _code(end) != 0)
    for is_cause in (
        lambda end: end.state is not None and end.state["OOMKilled"],
        lambda end: end.state is None,
        lambda end: _code(end) != FOLLOWED,
        lambda _end: True,
    ):
        for node in failed:
            if is_cause(ends[node]):
                return node
    return None


def _code(end: ContainerEnd) -> int | None:
    return int(end.state["ExitCode"]) if end.state is not None else None
