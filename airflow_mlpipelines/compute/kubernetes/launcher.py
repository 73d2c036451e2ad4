"""The launcher: a pod from before its creation until after its removal, whatever happens on the way."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import Launcher
from airflow_mlpipelines.compute.container_layout import container_paths
from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    UNREACHABLE,
    ClusterError,
    ClusterLostError,
    connect,
)
from airflow_mlpipelines.compute.kubernetes.failures import (
    end_failure,
    is_hopeless,
    refusal,
    start_failure,
    timeout_failure,
)
from airflow_mlpipelines.compute.kubernetes.images import PodImages
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    KILL_SECONDS,
    adoptable,
    belongs_to,
    create_pod,
    create_secret,
    discard,
    is_of,
    remove_pod,
    take_over,
)
from airflow_mlpipelines.compute.kubernetes.logs import LogFollower
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, STEP, plan_pod, pod_name
from airflow_mlpipelines.compute.kubernetes.relay import RunFileRelay
from airflow_mlpipelines.compute.kubernetes.template import lay_over, read_template
from airflow_mlpipelines.compute.kubernetes.transfer import collect, deliver
from airflow_mlpipelines.compute.kubernetes.watch import (
    PodEnd,
    StartTimeoutError,
    StartWatch,
    await_removal,
    container_state,
    watch_step,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, DataError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
_GONE_SECONDS = 15.0
_INTERRUPTED_SECONDS = 4.0


class _AdoptedByAnotherError(Exception):
    """Another try owns the pod by now."""


class KubernetesLauncher(Launcher):
    """Runs one step as one pod of a Kubernetes cluster.

    The worker waits for its pod, and all data travel through the API server: this suits steps whose
    inputs and outputs are some gigabytes at most. A GPU model (``gpu_type``) is asked for by the node label
    ``<gpu_resource>.product``, such as ``nvidia.com/gpu.product``, which NVIDIA's feature discovery sets.
    """

    def __init__(self, compute: KubernetesComputeSpec) -> None:
        self._compute = compute
        self._token = uuid.uuid4().hex
        self._images = PodImages(compute)
        self._name: str | None = None
        self._killed = False
        self._expired = False

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
        with self._in_words(launch.step_name):
            spec = self._plan(launch)
            self._name = spec.name
            try:
                pod = self._find_survivor(launch.step_run_id, handle)
                if pod is None:
                    pod = self._create(launch, spec, handle)
                else:
                    take_over(self._cluster, pod, self._token)
                    log.info("Adopting pod %s of an earlier try, with its log so far:", spec.name)
                end = self._attend(launch, spec, pod, hand_on, handle)
            finally:
                self._name = None
        self._check(launch, spec, end, tuple(tail))

    def kill(self) -> None:
        """Have the pod deleted: two seconds after SIGTERM, nothing in it is left.

        Called in the middle of :meth:`run`, also by a signal handler in its very thread: so it takes
        nothing of what ``run`` uses, and logs nothing. A pod that another try has adopted since is left
        alone.
        """
        self._killed = True
        name, cluster = self._name, self.__dict__.get("_cluster")
        if name is None or cluster is None:
            return
        # What fails here, run() finds out; and what is left, the next try removes.
        with suppress(ClusterError):
            own = cluster.again()
            pod = own.ask("GET", f"pods/{name}", seconds=_KILL_ANSWER_SECONDS)
            if belongs_to(pod, self._token):
                own.delete("pods", name, seconds=KILL_SECONDS, uid=pod["metadata"]["uid"])

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

    def _create(self, launch: StepLaunch, spec: PodSpec, handle: HandleStore) -> Mapping[str, Any]:
        """Return the pod, whose step may begin; whatever fails on the way leaves none."""
        cluster = self._cluster
        if self._killed:
            raise _killed(launch)
        pod = create_pod(cluster, spec, self._token)
        try:
            # Noted before anything of the program can run: whatever runs can be found again.
            handle.set({"launcher": "kubernetes", "pod": pod["metadata"]["uid"]})
            log.info("Pod %s in namespace %s", spec.name, cluster.namespace)
            if spec.secrets:
                create_secret(cluster, spec, pod)
            self._await(launch, spec, lambda found: container_state(found, STAGE)[0] == "running")
            deliver(cluster, spec, launch.stage)
            return pod
        except BaseException:
            with suppress(ClusterError):
                discard(cluster, spec, pod, seconds=KILL_SECONDS)
            handle.set(None)
            raise

    def _await(
        self, launch: StepLaunch, spec: PodSpec, done: Callable[[Mapping[str, Any]], bool]
    ) -> Mapping[str, Any]:
        """Return the pod once ``done``.

        Raises:
            StepFailedError: It will never be, or was killed.
            ComputeUnavailableError: It took too long.
        """
        watch = StartWatch(
            self._cluster,
            spec.name,
            schedule_seconds=self._compute.schedule_timeout_seconds,
            startup_seconds=self._compute.startup_timeout_seconds,
            is_hopeless=lambda pod, waited: self._killed or is_hopeless(pod, waited),
        )
        try:
            pod = watch.until(done)
        except StartTimeoutError as timeout:
            raise timeout_failure(launch.step_name, timeout, spec, self._compute) from timeout
        if self._killed:
            raise _killed(launch)
        if pod is None or not done(pod):
            raise start_failure(launch.step_name, pod, spec, self._compute)
        return pod

    def _attend(
        self,
        launch: StepLaunch,
        spec: PodSpec,
        pod: Mapping[str, Any],
        emit: Emit,
        handle: HandleStore,
    ) -> PodEnd:
        """Return how the step ended; what it made is on the worker then, and the pod is removed."""
        cluster = self._cluster
        over = threading.Event()
        try:
            pod = self._await(
                launch, spec, lambda found: container_state(found, STEP)[0] != "waiting"
            )
            if launch.timeout_seconds is not None:
                arguments = (pod, launch.timeout_seconds, over)
                threading.Thread(target=self._enforce_timeout, args=arguments, daemon=True).start()
            follower = LogFollower(cluster, spec.name, emit)
            with RunFileRelay(cluster, spec.name, launch.stage):
                end = watch_step(cluster, pod, follower, is_stopped=self._is_stopped)
            if not belongs_to(end.pod, self._token):
                raise _AdoptedByAnotherError
            self._fetch(launch, spec, end)
        except _AdoptedByAnotherError as error:
            raise StepFailedError(
                launch.step_name, "a later try has adopted its pod, and goes on with it"
            ) from error
        except (ClusterLostError, ClusterError):
            raise  # the pod is left alone, for the next try to adopt
        except BaseException as error:
            # Above all a timeout or an interrupt, which Airflow raises in here.
            with suppress(ClusterError):
                own = cluster.again()
                found = own.find("pods", spec.name)
                if found is not None and belongs_to(found, self._token):
                    discard(own, spec, pod, seconds=KILL_SECONDS)
                if not isinstance(error, StepFailedError | ComputeUnavailableError):
                    self._await_removal(own, pod, _INTERRUPTED_SECONDS)
            handle.set(None)
            raise
        finally:
            over.set()
        with suppress(ClusterError):  # what is left, the next try removes
            discard(cluster, spec, pod, seconds=1)
        if self._is_stopped():
            self._await_removal(cluster, pod, _GONE_SECONDS)
        handle.set(None)
        return end

    def _fetch(self, launch: StepLaunch, spec: PodSpec, end: PodEnd) -> None:
        """Bring to the worker what the step has made."""
        succeeded = (
            end.step is not None and end.step.get("exitCode") == 0 and not self._is_stopped()
        )
        image = _image_id(end.pod)
        if image is not None and "@" not in spec.image_name:
            log.info("Image %s was %s", spec.image_name, image)
        try:
            collect(self._cluster, spec.name, launch.stage, with_outputs=succeeded)
        except ClusterError as error:
            if succeeded:
                raise StepFailedError(
                    launch.step_name,
                    f"it ended well, but its outputs can't be fetched from its pod: {error}",
                ) from error
            log.warning("The files of pod %s can't be fetched: %s", spec.name, error)

    def _is_stopped(self) -> bool:
        return self._killed or self._expired

    def _await_removal(self, cluster: Cluster, pod: Mapping[str, Any], seconds: float) -> None:
        meta = pod["metadata"]
        if not await_removal(cluster, meta["name"], meta["uid"], seconds=seconds):
            log.warning("Pod %s is still ending", meta["name"])

    def _enforce_timeout(
        self, pod: Mapping[str, Any], seconds: float, over: threading.Event
    ) -> None:
        """End the pod when the step's time is up, counted from its start, also if another try began it."""
        left = seconds
        began = container_state(pod, STEP)[1].get("startedAt")
        if began is not None:
            left -= (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds()
        if over.wait(min(max(left, 0.0), seconds)):
            return
        self._expired = True
        cluster = self._cluster.again()
        while not over.is_set():
            with suppress(ClusterError):
                meta = pod["metadata"]
                cluster.delete("pods", meta["name"], seconds=KILL_SECONDS, uid=meta["uid"])
                return
            over.wait(1.0)

    def _check(
        self, launch: StepLaunch, spec: PodSpec, end: PodEnd, log_tail: tuple[str, ...]
    ) -> None:
        """Return if the step ended well.

        Raises:
            StepFailedError: It did not.
        """
        code = end.step.get("exitCode") if end.step is not None else None
        if self._killed:
            raise _killed(launch, log_tail)
        if self._expired:
            raise StepFailedError(
                launch.step_name,
                f"it ran longer than its timeout of {launch.timeout_seconds:g} seconds, and was killed",
                exit_code=code,
                log_tail=log_tail,
            )
        if code != 0:
            raise end_failure(launch.step_name, end, spec, log_tail)

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


def _image_id(pod: Mapping[str, Any]) -> str | None:
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == STEP and "sha256:" in str(container.get("imageID")):
            return str(container["imageID"])
    return None


def _killed(launch: StepLaunch, log_tail: tuple[str, ...] = ()) -> StepFailedError:
    return StepFailedError(launch.step_name, "it was killed", log_tail=log_tail)
