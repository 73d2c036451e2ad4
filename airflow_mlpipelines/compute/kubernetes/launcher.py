"""The launcher: what a step becomes on a cluster, and what is found there of an earlier try."""

from __future__ import annotations

import logging
import uuid
from collections import deque
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import Launcher
from airflow_mlpipelines.compute.container_layout import container_paths
from airflow_mlpipelines.compute.kubernetes.attending import PodAttendant, Stops
from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    UNREACHABLE,
    ClusterError,
    ClusterLostError,
    connect,
)
from airflow_mlpipelines.compute.kubernetes.failures import refusal
from airflow_mlpipelines.compute.kubernetes.gang import (
    discard_gang,
    find_gang,
    plan_gang,
    prepare_launch,
)
from airflow_mlpipelines.compute.kubernetes.gang_run import GangAttendant
from airflow_mlpipelines.compute.kubernetes.images import PodImages
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    KILL_SECONDS,
    adoptable,
    belongs_to,
    is_of,
    remove_pod,
)
from airflow_mlpipelines.compute.kubernetes.pod import plan_pod, pod_name
from airflow_mlpipelines.compute.kubernetes.template import lay_over, read_template
from airflow_mlpipelines.exceptions import DataError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_mlpipelines.compute.base import (
        Emit,
        HandleStore,
        ProcessPaths,
        ResolvedEnvironment,
        Stage,
        StepLaunch,
    )
    from airflow_mlpipelines.compute.built_images import ImageDefinition
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.definition.graph import EnvironmentSpec, KubernetesComputeSpec

log = logging.getLogger(__name__)

_TAIL_LINES = 50
_TAIL_CHARACTERS = 2000
_KILL_ANSWER_SECONDS = 1.0


class KubernetesLauncher(Launcher):
    """Runs one step as one pod of a Kubernetes cluster; on several nodes, as the pods of a Job.

    The worker waits for its pod, and all data travel through the API server: this suits steps whose
    inputs and outputs are some gigabytes at most. A GPU model (``gpu_type``) is asked for by the node label
    ``<gpu_resource>.product``, such as ``nvidia.com/gpu.product``, which NVIDIA's feature discovery sets.
    """

    def __init__(self, compute: KubernetesComputeSpec) -> None:
        self._compute = compute
        self._token = uuid.uuid4().hex
        self._images = PodImages(compute)
        self._name: str | None = None
        self._gang: str | None = None
        self._stops = Stops()

    @cached_property
    def _cluster(self) -> Cluster:
        """The connection of the thread that runs the step; whoever interrupts it opens another one."""
        return connect(self._compute)

    # ---- the environment -------------------------------------------------------------------

    def resolve_environment(self, environment: EnvironmentSpec | None) -> ResolvedEnvironment:
        """Return the image by digest: as its name says, or as its registry does.

        One that has to be built is known by its definition. Where the registry does not tell, the step runs by
        its tag, but nothing of it is reused: a tag may mean another image on every node and every day.
        """
        return self._images.resolve(environment)

    def prepare_environment(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment, *, emit: Emit
    ) -> ResolvedEnvironment:
        """Return ``resolved`` with an image that the node can pull: one to be built is in the registry now.

        Raises:
            EnvironmentBuildError: It can't be built, or not be pushed.
            ComputeUnavailableError: The registry, or the daemon that is to build it, does not answer.
        """
        return self._images.prepare(environment, resolved, emit=emit, guard=self.build_guard)

    def recall_environment(
        self, environment: EnvironmentSpec | None, description: Mapping[str, Any]
    ) -> ResolvedEnvironment | None:
        """Return the image, or the definition on its bases, that the description names by digest."""
        return self._images.recall(environment, description)

    def is_prepared(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment
    ) -> bool | None:
        """Return whether the registry has the image."""
        return self._images.is_prepared(environment, resolved)

    def define_image(self, environment: EnvironmentSpec) -> ImageDefinition:
        """Return the image to be built for an environment.

        Raises:
            EnvironmentBuildError: It has no base, can't be built anywhere, or could be kept nowhere.
        """
        return self._images.define(environment)

    def process_paths(self, stage: Stage, environment: ResolvedEnvironment) -> ProcessPaths:
        """Return the places of ``stage`` below ``/mlp``."""
        return container_paths(stage, environment.python)

    # ---- the pod ---------------------------------------------------------------------------

    def recover(self, step_run_id: str, handle: HandleStore) -> bool:
        """Return whether an earlier try's pod is there to adopt: its step runs, or nobody has read its end.

        Any other pod of this step run is removed.

        Raises:
            ComputeUnavailableError: The cluster does not answer.
        """
        with self._in_words(step_run_id):
            noted = handle.get() or {}
            if "job" in noted:
                return find_gang(self._cluster, step_run_id, noted["job"]) is not None
            return self._find_survivor(step_run_id, handle) is not None

    def run(self, launch: StepLaunch, *, emit: Emit, handle: HandleStore) -> None:
        """Run the step's pod to its end; an earlier try's is adopted, with its whole log.

        Raises:
            StepFailedError: It did not start, or ended with another exit code than 0.
            ComputeUnavailableError: The cluster does not answer. A pod that runs is left alone, for the
                next try to adopt.
        """
        tail: deque[str] = deque(maxlen=_TAIL_LINES)

        def hand_on(line: str) -> None:
            tail.append(line[:_TAIL_CHARACTERS])
            emit(line)

        stage = launch.stage
        for directory in (stage.root, stage.code, stage.run, stage.outputs_root):
            # An adopted pod's first worker may have been another machine.
            directory.mkdir(parents=True, exist_ok=True)
        if launch.nodes > 1:
            self._run_gang(launch, emit, handle)
            return
        with self._in_words(launch.step_name):
            spec = self._plan(launch)
            attendant = PodAttendant(
                self._cluster, launch, spec, token=self._token, handle=handle, stops=self._stops
            )
            self._name = spec.name
            try:
                end = attendant.run(self._find_survivor(launch.step_run_id, handle), hand_on)
            finally:
                self._name = None
        attendant.check(end, tuple(tail))

    def kill(self) -> None:
        """Have the pod deleted: two seconds after SIGTERM, nothing in it is left.

        Called in the middle of :meth:`run`, also by a signal handler in its very thread: so it takes
        nothing of what ``run`` uses, and logs nothing. A pod that another try has adopted since is left
        alone.
        """
        self._stops.killed = True
        name, cluster = self._name, self.__dict__.get("_cluster")
        if name is None or cluster is None:
            return
        # What fails here, run() finds out; and what is left, the next try removes.
        with suppress(ClusterError):
            own = cluster.again()
            if self._gang is not None:
                job = own.ask("GET", f"jobs/{name}", seconds=_KILL_ANSWER_SECONDS)
                if belongs_to(job, self._token):
                    discard_gang(own, self._gang)
                return
            pod = own.ask("GET", f"pods/{name}", seconds=_KILL_ANSWER_SECONDS)
            if belongs_to(pod, self._token):
                own.delete("pods", name, seconds=KILL_SECONDS, uid=pod["metadata"]["uid"])

    def _run_gang(self, launch: StepLaunch, emit: Emit, handle: HandleStore) -> None:
        with self._in_words(launch.step_name):
            prepared = prepare_launch(launch, self._compute)
            spec = plan_gang(self._plan(prepared), prepared)
            attendant = GangAttendant(
                self._cluster, prepared, spec, token=self._token, handle=handle, stops=self._stops
            )
            self._gang, self._name = launch.step_run_id, spec.name
            try:
                attendant.run(emit)
            finally:
                self._name = None

    def _plan(self, launch: StepLaunch) -> PodSpec:
        image = self._images.name or launch.image or ""
        spec = plan_pod(launch, self._compute, image_name=image)
        if self._compute.pod_template_file is not None:
            try:
                template = read_template(self._compute.pod_template_file)
            except DataError as error:
                raise StepFailedError(launch.step_name, str(error), retryable=False) from error
            spec.manifest.update(lay_over(template, spec.manifest))
        return spec

    def _find_survivor(self, step_run_id: str, handle: HandleStore) -> Mapping[str, Any] | None:
        """Return the pod of an earlier try to adopt; remove what is not to be adopted."""
        cluster = self._cluster
        found, _ = cluster.find_patiently("pods", pod_name(step_run_id), patience=PATIENCE_SECONDS)
        if found is None:
            return None
        noted = (handle.get() or {}).get("pod")
        if adoptable(found, step_run_id, noted):
            return found
        if not is_of(found, step_run_id):
            return None  # it only has the name; making ours will say so
        log.info("Removing pod %s, which an earlier try left behind", found["metadata"]["name"])
        remove_pod(cluster, found)
        return None

    @contextmanager
    def _in_words(self, step: str) -> Iterator[None]:
        """Turn the cluster's refusals and absence into errors that say what to do."""
        try:
            yield
        except ClusterError as error:
            raise refusal(step, error, self._compute, self._cluster) from error
        except ClusterLostError as error:
            lost = ClusterError(UNREACHABLE, str(error))
            raise refusal(step, lost, self._compute, self._cluster) from error
