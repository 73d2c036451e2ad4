"""The launcher: what a step becomes on a cluster, and what is found there of an earlier try."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import Launcher
from airflow_mlpipelines.compute.container_layout import container_paths
from airflow_mlpipelines.compute.kubernetes.agent import add_agent, can_carry
from airflow_mlpipelines.compute.kubernetes.attending import PodAttendant
from airflow_mlpipelines.compute.kubernetes.cluster import (
    PATIENCE_SECONDS,
    UNREACHABLE,
    ClusterError,
    ClusterLostError,
    PodUnreachableError,
    connect,
)
from airflow_mlpipelines.compute.kubernetes.contact import ContactKeeper
from airflow_mlpipelines.compute.kubernetes.detaching import PodNews, Reason
from airflow_mlpipelines.compute.kubernetes.failures import PodLostError, lost_unseen
from airflow_mlpipelines.compute.kubernetes.following import TAIL_LINES, Stops
from airflow_mlpipelines.compute.kubernetes.gang import (
    discard_gang,
    find_gang,
    plan_gang,
    prepare_launch,
)
from airflow_mlpipelines.compute.kubernetes.gang_run import GangAttendant
from airflow_mlpipelines.compute.kubernetes.images import PodImages
from airflow_mlpipelines.compute.kubernetes.killing import delete_own, persist
from airflow_mlpipelines.compute.kubernetes.lifetime import (
    adoptable,
    has_files,
    is_of,
    is_waiting,
    remove_pod,
)
from airflow_mlpipelines.compute.kubernetes.packing import awaits_files
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, plan_pod, pod_name
from airflow_mlpipelines.compute.kubernetes.pull_secrets import add_pull_secret
from airflow_mlpipelines.compute.kubernetes.refusals import refusal
from airflow_mlpipelines.compute.kubernetes.relaunch import PodNote
from airflow_mlpipelines.compute.kubernetes.releasing import Owned, remove_owned
from airflow_mlpipelines.compute.kubernetes.starting import start_failure
from airflow_mlpipelines.compute.kubernetes.template import lay_over, read_template
from airflow_mlpipelines.compute.kubernetes.volumes import mount_shared, works_with_stage
from airflow_mlpipelines.compute.kubernetes.watch import container_state
from airflow_mlpipelines.exceptions import ComputeUnavailableError, DataError, StepFailedError

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
    from airflow_mlpipelines.storage.stores import Store

log = logging.getLogger(__name__)

_TAIL_CHARACTERS = 2000


class KubernetesLauncher(Launcher):
    """Runs one step as one pod of a Kubernetes cluster; on several nodes, as the pods of a Job.

    Data travel through a worker and the API server, which suits some gigabytes, unless the compute has an agent or
    shared volumes. A GPU model (``gpu_type``) is asked for by the node label ``gpu_type_label``.
    """

    carries_files = True

    def __init__(self, compute: KubernetesComputeSpec) -> None:
        self._compute = compute
        self._token = uuid.uuid4().hex
        self._images = PodImages(compute)
        self._name: str | None = None
        self._gang: str | None = None
        self._note: PodNote | None = None
        self._is_kept = False
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

    def can_carry(self, store: Store) -> bool:
        """Return whether the pod's agent can open ``store``, as any machine can that has its credentials."""
        return can_carry(self._compute, store)

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
        """Return whether an earlier worker's pod is there to adopt: its step runs, or nobody has read its end.

        Any other pod of this step run is removed, but for one that was left to itself and waits for its files.

        Raises:
            ComputeUnavailableError: The cluster does not answer.
        """
        with self._in_words(step_run_id):
            note = PodNote(handle)
            if note.job is not None:
                waits = note.awaits is not None
                pods = find_gang(self._cluster, step_run_id, note.job, waits=waits)
                return pods is not None and all(has_files(pod) for pod in pods)
            found = self._find_survivor(step_run_id, note)
        return found is not None and not awaits_files(found)

    def run(self, launch: StepLaunch, *, emit: Emit, handle: HandleStore) -> None:
        """Run the step's pod to its end; an earlier try's is adopted, with its whole log.

        Raises:
            DetachedError: It takes long, and goes on without this worker.
            RelaunchError: The cluster took the pod away, for which a program is not to blame.
            StepFailedError: It did not start, or ended with another exit code than 0.
            ComputeUnavailableError: The cluster does not answer. A pod that runs is left alone, for the
                next try to adopt.
        """
        stage = launch.stage
        for directory in (stage.root, stage.code, stage.run, stage.outputs_root):
            # An adopted pod's first worker may have been another machine.
            directory.mkdir(parents=True, exist_ok=True)
        note = self._note = PodNote(handle)
        if launch.news is not None and PodNews.from_dict(launch.news).reason is Reason.RETRY:
            launch = replace(launch, news=None)  # there was no pod yet that could have any
        try:
            with self._in_words(launch.step_name):
                if launch.nodes > 1:
                    self._run_gang(launch, emit, note)
                else:
                    self._run_pod(launch, emit, note)
        except PodLostError as lost:
            again = note.charge(lost)
            if again is None:
                raise
            raise again from lost
        except (StepFailedError, ComputeUnavailableError):
            if note.is_empty:  # else it is another try's by now
                note.forget()
            raise
        self._is_kept = not note.is_empty
        if not self._is_kept:
            self._name = None
            note.forget()

    def release(self, step_run_id: str, handle: HandleStore) -> bool:
        """Remove the pod, or the Job, of this try or the one that is noted; another try's is left alone."""
        has_run, self._name = self._note is not None, None
        note = self._note or PodNote(handle)
        if note.is_empty and not has_run:
            return True
        owned = Owned(
            token=self._token,
            pod=None if self._is_kept else note.pod,
            job=None if self._is_kept else note.job,
            is_gang=self._gang is not None or note.job is not None,
        )
        try:
            gone = remove_owned(self._cluster, step_run_id, owned)
        except (ClusterError, ClusterLostError, ComputeUnavailableError) as error:
            log.warning("Pod %s could not be removed: %s", pod_name(step_run_id), error)
            return False
        if gone:
            note.forget()
        return gone

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
        kind = "pods" if self._gang is None else "jobs"
        seen = self._stops.look() if self._stops.look is not None else None
        owned = threading.Event()

        def end() -> None:
            own = cluster.again(hurried=True)
            if owned.is_set() or delete_own(own, kind, name, token=self._token, seen=seen):
                owned.set()
                if self._gang is not None:  # its pods would follow the Job, but take their time
                    discard_gang(own, self._gang, patience=0)

        persist(end)  # what is left after that, the next try removes

    def _run_pod(self, launch: StepLaunch, emit: Emit, note: PodNote) -> None:
        tail: deque[str] = deque(maxlen=TAIL_LINES)

        def hand_on(line: str) -> None:
            tail.append(line[:_TAIL_CHARACTERS])
            emit(line)

        spec = self._plan(launch)
        attendant = PodAttendant(
            self._cluster, launch, spec, token=self._token, note=note, stops=self._stops
        )
        self._name = spec.name
        end = attendant.run(self._find_pod(launch, spec, note), hand_on)
        attendant.check(end, tuple(tail))

    def _run_gang(self, launch: StepLaunch, emit: Emit, note: PodNote) -> None:
        prepared = prepare_launch(launch, self._compute)
        spec = plan_gang(self._plan(prepared), prepared)
        attendant = GangAttendant(
            self._cluster, prepared, spec, token=self._token, note=note, stops=self._stops
        )
        self._gang, self._name = launch.step_run_id, spec.name
        with ContactKeeper(self._cluster, launch.step_run_id):
            attendant.run(emit)

    def _plan(self, launch: StepLaunch) -> PodSpec:
        image = self._images.name or launch.image or ""
        spec = plan_pod(launch, self._compute, image_name=image)
        if launch.carriage:
            spec = add_agent(spec, launch, self._compute)
        spec = mount_shared(add_pull_secret(spec, self._compute), launch, self._compute)
        self.carries_files = not works_with_stage(launch.stage, spec)
        if self._compute.pod_template_file is not None:
            try:
                template = read_template(self._compute.pod_template_file)
            except DataError as error:
                raise StepFailedError(launch.step_name, str(error), retryable=False) from error
            spec.manifest.update(lay_over(template, spec.manifest))
        return spec

    def _find_pod(
        self, launch: StepLaunch, spec: PodSpec, note: PodNote
    ) -> Mapping[str, Any] | None:
        """Return the pod to go on with; None if there is to be a new one."""
        if launch.news is None:
            return self._find_survivor(launch.step_run_id, note)
        name = pod_name(launch.step_run_id)
        found, _ = self._cluster.find_patiently("pods", name, patience=PATIENCE_SECONDS)
        if found is None or found["metadata"]["uid"] != note.pod:
            seen = PodNews.from_dict(launch.news).pods.get(name)
            if seen is not None and container_state(seen, STAGE)[1].get("exitCode"):
                raise start_failure(launch.step_name, seen, spec, self._compute)
            raise lost_unseen(launch.step_name, seen)
        return found

    def _find_survivor(self, step_run_id: str, note: PodNote) -> Mapping[str, Any] | None:
        """Return the pod of an earlier worker to go on with; remove what is of no use."""
        cluster = self._cluster
        found, _ = cluster.find_patiently("pods", pod_name(step_run_id), patience=PATIENCE_SECONDS)
        if found is None:
            return None
        if adoptable(found, step_run_id, note.pod) or (
            note.awaits is not None and is_waiting(found, step_run_id, note.pod)
        ):
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
        except PodUnreachableError as error:
            raise ComputeUnavailableError(
                f"compute {self._compute.name!r}: {error}. Are its node's kubelet and the way from the API server to "
                "it well (kubectl exec)? What a program has made is still there: the next try fetches it."
            ) from error
        except ClusterLostError as error:
            lost = ClusterError(UNREACHABLE, str(error))
            raise refusal(step, lost, self._compute, self._cluster) from error
