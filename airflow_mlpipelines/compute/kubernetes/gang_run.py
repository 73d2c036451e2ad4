"""The life of a gang of pods under one try: made or adopted, given its files, followed to its end, removed."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.gang_logs import GangLogs
from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError, ClusterLostError
from airflow_mlpipelines.compute.kubernetes.failures import end_failure
from airflow_mlpipelines.compute.kubernetes.gang import (
    await_gang_removal,
    create_belongings,
    create_gang,
    discard_gang,
    find_gang,
)
from airflow_mlpipelines.compute.kubernetes.gang_files import merge_node, stage_of_node
from airflow_mlpipelines.compute.kubernetes.gang_start import at_node, await_pods
from airflow_mlpipelines.compute.kubernetes.lifetime import KILL_SECONDS, belongs_to
from airflow_mlpipelines.compute.kubernetes.logs import LogFollower
from airflow_mlpipelines.compute.kubernetes.pod import OWNER, STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.relay import RunFileRelay
from airflow_mlpipelines.compute.kubernetes.transfer import collect, deliver
from airflow_mlpipelines.compute.kubernetes.watch import PodEnd, container_state, watch_step
from airflow_mlpipelines.compute.threads import in_parallel
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from airflow_mlpipelines.runtime.nodes import FOLLOWED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.base import Emit, HandleStore, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.attending import Stops
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.gang import GangSpec, Pods

log = logging.getLogger(__name__)

_FOLLOW_SECONDS = 15.0
"""What the other nodes have to end by themselves after the first that failed."""
_FORCE_SECONDS = 60.0
_GONE_SECONDS = 20.0
_INTERRUPTED_SECONDS = 4.0


class GangAttendant:
    """Sees one step run through on the pods of a gang. One instance serves one try."""

    def __init__(
        self,
        cluster: Cluster,
        launch: StepLaunch,
        spec: GangSpec,
        *,
        token: str,
        handle: HandleStore,
        stops: Stops,
    ) -> None:
        """Prepare, with what :class:`~airflow_mlpipelines.compute.kubernetes.attending.PodAttendant` takes."""
        self._cluster = cluster
        self._launch = launch
        self._spec = spec
        self._token = token
        self._handle = handle
        self._stops = stops

    def run(self, emit: Emit) -> None:
        """Run all nodes to their end, or adopt those of an earlier try; what they made is on the worker then.

        Raises:
            StepFailedError: They did not start, were killed, or one ended with another exit code than 0.
            ComputeUnavailableError: They did not all get a place in time.
            ClusterError: The cluster refuses.
            ClusterLostError: It does not answer. What runs is left alone, for the next try to adopt.
        """
        noted = (self._handle.get() or {}).get("job")
        pods = find_gang(self._cluster, self._launch.step_run_id, noted)
        if pods is None:
            self._create()
        else:
            body = {"metadata": {"annotations": {OWNER: self._token}}}
            self._cluster.ask("PATCH", f"jobs/{self._spec.name}", body=body)
            log.info("Adopting Job %s of an earlier try, with its log so far:", self._spec.name)
        self._check(self._attend(emit))

    def _create(self) -> None:
        """Make all pods, and give them their files; whatever fails on the way leaves none."""
        cluster, spec = self._cluster, self._spec
        if self._stops.killed:
            raise self._was_killed()
        job = create_gang(cluster, spec, self._token)
        try:
            # Noted before anything of the program can run: whatever runs can be found again.
            self._handle.set({"launcher": "kubernetes", "job": job["metadata"]["uid"]})
            log.info("Job %s in namespace %s", spec.name, cluster.namespace)
            create_belongings(cluster, spec, job)
            pods = self._await(lambda pod: container_state(pod, STAGE)[0] == "running")
            in_parallel(self._deliver, pods)
        except BaseException:
            with suppress(ClusterError):
                discard_gang(cluster.again(), self._launch.step_run_id)
            self._handle.set(None)
            raise

    def _deliver(self, pod: Mapping[str, Any]) -> None:
        named = replace(self._spec.pod, name=pod["metadata"]["name"])
        deliver(self._cluster.again(), named, self._launch.stage)

    def _await(self, done: Callable[[Mapping[str, Any]], bool]) -> Pods:
        pods = await_pods(
            self._cluster, self._launch.step_name, self._spec, done, lambda: self._stops.killed
        )
        if self._stops.killed:
            raise self._was_killed()
        return pods

    def _attend(self, emit: Emit) -> GangLogs[PodEnd]:
        """Return the logs with all nodes' ends; what the nodes made is on the worker, and the pods are removed."""
        cluster, step_run_id = self._cluster, self._launch.step_run_id
        over = threading.Event()
        logs: GangLogs[PodEnd] | None = None
        try:
            pods = self._await(lambda pod: container_state(pod, STEP)[0] != "waiting")
            if self._launch.timeout_seconds is not None:
                arguments = (pods[0], self._launch.timeout_seconds, over)
                threading.Thread(target=self._enforce_timeout, args=arguments, daemon=True).start()
            logs = GangLogs([partial(self._watch, pod) for pod in pods], emit)
            first = str(pods[0]["metadata"]["name"])
            with RunFileRelay(cluster, first, self._launch.stage):
                self._await_all(logs)
            job = cluster.find("jobs", self._spec.name)
            if job is not None and not belongs_to(job, self._token):
                raise StepFailedError(
                    self._launch.step_name,
                    "a later try has adopted its pods, and goes on with them",
                )
            self._fetch(logs)
        except (ClusterLostError, ClusterError):
            raise  # the pods are left alone, for the next try to adopt
        except BaseException as error:
            # Above all a timeout or an interrupt, which Airflow raises in here.
            with suppress(ClusterError):
                own = cluster.again()
                job = own.find("jobs", self._spec.name)
                if job is not None and belongs_to(job, self._token):
                    discard_gang(own, step_run_id)
                    if not isinstance(error, StepFailedError | ComputeUnavailableError):
                        await_gang_removal(own, step_run_id, seconds=_INTERRUPTED_SECONDS)
                if job is None or belongs_to(job, self._token):
                    self._handle.set(None)
            raise
        finally:
            over.set()
            if logs is not None:
                logs.close()
        with suppress(ClusterError):  # what is left, the next try removes
            discard_gang(cluster, step_run_id, seconds=1)
        if self._stops and not await_gang_removal(cluster, step_run_id, seconds=_GONE_SECONDS):
            log.warning("Pods of Job %s are still ending", self._spec.name)
        self._handle.set(None)
        return logs

    def _watch(self, pod: Mapping[str, Any], emit: Emit) -> PodEnd:
        cluster = self._cluster.again()
        follower = LogFollower(cluster, pod["metadata"]["name"], emit)
        return watch_step(cluster, pod, follower, is_stopped=lambda: bool(self._stops))

    def _await_all(self, logs: GangLogs[PodEnd]) -> None:
        """Hand on the logs until all nodes have ended; where one has failed, none outlives it for long."""
        deadline: float | None = None
        grace = KILL_SECONDS
        while len(logs.ends) < self._spec.nodes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended = logs.follow(left)
            if ended is None:
                with suppress(ClusterError):
                    own = self._cluster.again()
                    discard_gang(own, self._launch.step_run_id, seconds=grace)
                grace = 0  # next time, of a node that does not answer
                deadline = time.monotonic() + _FORCE_SECONDS
            elif deadline is None and _code(ended[1]) != 0:
                deadline = time.monotonic() + _FOLLOW_SECONDS

    def _fetch(self, logs: GangLogs[PodEnd]) -> None:
        """Bring to the worker what all nodes have made, as if they had shared their directories."""
        stage = self._launch.stage
        succeeded = not self._stops and all(_code(end) == 0 for end in logs.ends.values())
        fetched: list[int] = []

        def fetch(node: int) -> None:
            name = str(logs.ends[node].pod["metadata"]["name"])
            own = stage_of_node(stage, node)
            try:
                collect(self._cluster.again(), name, own, with_outputs=succeeded)
            except ClusterError as error:
                if succeeded:
                    raise StepFailedError(
                        self._launch.step_name,
                        f"it ended well, but its outputs can't be fetched from pod {name!r}: {error}",
                    ) from error
                log.warning("The files of pod %s can't be fetched: %s", name, error)
            else:
                fetched.append(node)

        in_parallel(fetch, sorted(logs.ends))
        for node in sorted(fetched):
            refused = merge_node(stage, node) if node else []
            if refused:
                log.warning(
                    "Of files that several nodes have written, that of the lowest node is kept. Not kept of node "
                    "%s: %s",
                    node,
                    ", ".join(refused[:10]),
                )

    def _enforce_timeout(
        self, pod: Mapping[str, Any], seconds: float, over: threading.Event
    ) -> None:
        """End all pods when the step's time is up, counted from its start, also if another try began it."""
        left = seconds
        began = container_state(pod, STEP)[1].get("startedAt")
        if began is not None:
            left -= (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds()
        if over.wait(min(max(left, 0.0), seconds)):
            return
        self._stops.expired = True
        while not over.is_set():
            with suppress(ClusterError):
                discard_gang(self._cluster.again(), self._launch.step_run_id)
                return
            over.wait(1.0)

    def _check(self, logs: GangLogs[PodEnd]) -> None:
        """Return if all nodes ended well.

        Raises:
            StepFailedError: One did not: the one that the others followed.
        """
        step = self._launch.step_name
        if self._stops.killed:
            raise self._was_killed(tuple(logs.tails[0]))
        if self._stops.expired:
            raise StepFailedError(
                step,
                f"it ran longer than its timeout of {self._launch.timeout_seconds:g} seconds, and was killed",
                exit_code=_code(logs.ends[0]),
                log_tail=tuple(logs.tails[0]),
            )
        node = find_culprit(logs.ends)
        if node is not None:
            end = logs.ends[node]
            error = end_failure(step, end, self._spec.pod, tuple(logs.tails[node]))
            raise at_node(error, end.pod, self._spec)

    def _was_killed(self, log_tail: tuple[str, ...] = ()) -> StepFailedError:
        return StepFailedError(self._launch.step_name, "it was killed", log_tail=log_tail)


def find_culprit(ends: Mapping[int, PodEnd]) -> int | None:
    """Return the node that failed first, as far as ends tell; None if all ended well.

    A node that lacked memory, or whose pod was taken away, is to blame for others; one that was ended because
    of another node is not, if there is any such.
    """
    failed = sorted(node for node, end in ends.items() if _code(end) != 0)
    for is_cause in (
        lambda end: end.step is not None and end.step.get("reason") == "OOMKilled",
        lambda end: _code(end) not in (None, FOLLOWED) and not end.gone,
        lambda end: end.step is None,
        lambda end: _code(end) != FOLLOWED,
        lambda _end: True,
    ):
        for node in failed:
            if is_cause(ends[node]):
                return node
    return None


def _code(end: PodEnd) -> int | None:
    return end.step.get("exitCode") if end.step is not None else None
