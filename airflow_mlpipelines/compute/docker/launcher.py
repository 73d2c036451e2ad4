"""The launcher: a container from before its start until after its removal, whatever happens on the way."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import Launcher
from airflow_mlpipelines.compute.container_layout import container_paths
from airflow_mlpipelines.compute.docker.attending import (
    ContainerAttendant,
    find_survivor,
    is_ours,
)
from airflow_mlpipelines.compute.docker.container import (
    plan_container,
)
from airflow_mlpipelines.compute.docker.daemon import (
    connect,
    find_container,
    has_containers,
    remove_container,
    stop_container,
    unreachable,
)
from airflow_mlpipelines.compute.docker.environments import (
    define_image,
    find_built,
    provide_image,
    recall_definition,
)
from airflow_mlpipelines.compute.docker.gang import find_survivors
from airflow_mlpipelines.compute.docker.gang_run import GangRun
from airflow_mlpipelines.compute.docker.gpus import check_gpus
from airflow_mlpipelines.compute.docker.hosts import (
    OWNER_FILE,
    Daemon,
    DaemonHandle,
    identify,
    locate,
)
from airflow_mlpipelines.compute.docker.images import (
    find_image,
    local_image,
    pull_conn_id,
    pull_image,
    recall_image,
)
from airflow_mlpipelines.compute.docker.users import default_user
from airflow_mlpipelines.compute.images import image_name, resolve_image
from airflow_mlpipelines.compute.stopped import was_killed
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from docker import APIClient

    from airflow_mlpipelines.compute.base import (
        Emit,
        HandleStore,
        ProcessPaths,
        ResolvedEnvironment,
        Stage,
        StepLaunch,
    )
    from airflow_mlpipelines.compute.built_images import ImageDefinition
    from airflow_mlpipelines.definition.graph import (
        DockerComputeSpec,
        EnvironmentSpec,
        ResourcesSpec,
    )

log = logging.getLogger(__name__)

_PLAN_TIMEOUT = 15
_KILL_TIMEOUT = 1
_LOG_END_SECONDS = 0.4
_TAIL_LINES = 50
_TAIL_CHARACTERS = 2000


class DockerLauncher(Launcher):
    """Runs one step as one container of a Docker daemon; on several nodes, as several."""

    def __init__(self, compute: DockerComputeSpec) -> None:
        self._compute = compute
        self._token = uuid.uuid4().hex
        self._definition: ImageDefinition | None = None
        self._image_name: str | None = None
        self._name: str | None = None
        self._owner_file: Path | None = None
        self._gang: GangRun | None = None
        self._killed = False
        self._over = threading.Event()

    @cached_property
    def _client(self) -> APIClient:
        """The connection of the thread that runs the step; whoever interrupts it opens another one."""
        return connect(self._compute)

    @cached_property
    def _daemon(self) -> Daemon:
        return identify(self._client, self._compute)

    def check_resources(self, step: str, resources: ResourcesSpec, *, nodes: int = 1) -> None:
        """Return, unless the step asks for GPUs that the daemon can't hand out.

        Raises:
            StepFailedError: It does.
            ComputeUnavailableError: The daemon does not answer.
        """
        del nodes  # that there are as many is checked with the definition, and before the start
        if not resources.gpus:
            return
        client = self._client
        try:
            check_gpus(step, client, self._compute, resources.gpus)
        except OSError as error:  # docker's and requests' errors are OSErrors
            raise unreachable(self._compute, str(error)) from error

    # ---- the environment -------------------------------------------------------------------

    def resolve_environment(self, environment: EnvironmentSpec | None) -> ResolvedEnvironment:
        """Return the image by digest: as its name says, as the daemon has it, or as its registry does.

        One that has to be built is known by its definition, with its base by digest. Where none of them tells, the step still runs, but nothing of it is reused.
        """
        if environment is not None and environment.needs_build:
            return self.define_image(environment).resolve()
        name = image_name(environment, self._compute)
        identity = find_image(name, self._compute, timeout=_PLAN_TIMEOUT)
        return resolve_image(name, identity, environment)

    def prepare_environment(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment, *, emit: Emit
    ) -> ResolvedEnvironment:
        """Return ``resolved`` with its image on the daemon, pulled or built if it has to be.

        Raises:
            EnvironmentBuildError: There is no such image, it may not be pulled, or it can't be built.
            ComputeUnavailableError: The daemon or the registry does not answer.
        """
        if environment is not None and environment.needs_build:
            definition, built = provide_image(
                self.define_image(environment),
                self._compute,
                emit=emit,
                guard=self.build_guard,
            )
            self._image_name = definition.name
            return definition.resolve(built.reference)
        name = image_name(environment, self._compute)
        self._image_name = name
        reference = resolved.image or name
        client = self._client
        identity = local_image(client, reference)
        if identity is None:
            puller = connect(self._compute, conn_id=pull_conn_id(self._compute))
            pull_image(puller, reference, emit=emit)
            identity = local_image(client, reference)
        if resolved.cacheable or identity is None:
            return resolved
        return resolve_image(name, identity, environment)

    def recall_environment(
        self, environment: EnvironmentSpec | None, description: Mapping[str, Any]
    ) -> ResolvedEnvironment | None:
        """Return the image, or the definition on its bases, that the description names by digest."""
        if environment is not None and environment.needs_build:
            self._definition = recall_definition(environment, self._compute, description)
            return self._definition.resolve()
        name, digest = str(description.get("image")), description.get("digest")
        if digest is None:
            return None
        return resolve_image(name, recall_image(self._client, name, digest), environment)

    def is_prepared(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment
    ) -> bool | None:
        """Return whether the image is on the daemon, or in the workspace's registry."""
        try:
            if environment is not None and environment.needs_build:
                return find_built(self.define_image(environment), self._compute) is not None
            return local_image(self._client, resolved.image or "") is not None
        except ComputeUnavailableError:
            return None

    def define_image(self, environment: EnvironmentSpec) -> ImageDefinition:
        """Return the image to be built for an environment, the same one for as long as this launcher lives.

        Raises:
            EnvironmentBuildError: It has no base, or can't be built anywhere.
        """
        if self._definition is None or self._definition.environment != environment:
            self._definition = define_image(environment, self._compute, timeout=_PLAN_TIMEOUT)
        return self._definition

    def process_paths(self, stage: Stage, environment: ResolvedEnvironment) -> ProcessPaths:
        """Return the places of ``stage`` below ``/mlp``."""
        return container_paths(stage, environment.python)

    # ---- the container ---------------------------------------------------------------------

    def recover(self, step_run_id: str, handle: HandleStore) -> bool:
        """Return whether an earlier try's container is there to adopt, running or ended.

        Any other container of this step run is removed. If it is on another daemon than this worker's, that
        is the launcher's from then on.

        Raises:
            ComputeUnavailableError: The daemon does not answer, or another worker's has the container and can't
                be reached from here.
        """
        self._go_to_survivor(step_run_id, handle)
        client = self._client
        if not has_containers(client, step_run_id):
            return False
        if find_survivor(client, step_run_id, handle) is not None:
            return True
        return find_survivors(client, step_run_id, handle) is not None

    def run(self, launch: StepLaunch, *, emit: Emit, handle: HandleStore) -> None:
        """Run the step's container to its end; an earlier try's is adopted, with its whole log.

        Raises:
            StepFailedError: It did not start, or ended with another exit code than 0.
            ComputeUnavailableError: The daemon does not answer, or another worker's has an earlier try's
                container. A container that runs is left alone, for the next try to adopt.
        """
        tail: deque[str] = deque(maxlen=_TAIL_LINES)

        def hand_on(line: str) -> None:
            tail.append(line[:_TAIL_CHARACTERS])
            emit(line)

        self._go_to_survivor(launch.step_run_id, handle)
        self._claim(launch)
        try:
            client = self._client
            handle = DaemonHandle(handle, self._daemon, launch.stage.root)
            user = self._compute.user or default_user(client)
            image = self._image_name or launch.image or ""
            spec = plan_container(launch, self._compute, image_name=image, user=user)
            if launch.nodes > 1:
                self._gang = GangRun(launch, self._compute)
                if self._killed:
                    raise was_killed(launch)
                self._gang.run(client, spec, emit=emit, handle=handle)
                return
            attendant = ContainerAttendant(
                client, self._compute, launch, handle=handle, is_killed=lambda: self._killed
            )
            end = attendant.run(spec, hand_on)
        finally:
            self._name = None
            self._over.set()
        attendant.check(spec, end, tuple(tail))

    def kill(self) -> None:
        """End the container and remove it: two seconds after SIGTERM, nothing in it is left.

        Called in the middle of :meth:`run`, also by a signal handler in its very thread: so it takes
        nothing of what ``run`` uses, and logs nothing. A container that another try has adopted since
        is left alone.
        """
        self._killed = True
        name = self._name
        if name is None or not self._is_owner():
            return
        if self._gang is not None:
            self._gang.kill()
            return
        # What fails here, run() finds out; and what is left, the next try removes.
        with suppress(ComputeUnavailableError, OSError):
            client = connect(self._compute, timeout=_KILL_TIMEOUT)
            if is_ours(find_container(client, name), name):
                stop_container(client, name)
                # A log that is followed does not end if its container goes at once.
                self._over.wait(_LOG_END_SECONDS)
                remove_container(client, name)

    def _go_to_survivor(self, step_run_id: str, handle: HandleStore) -> None:
        """Take the daemon that an earlier try's containers are on, where a worker with another one had it."""
        found = locate(step_run_id, self._compute, self._daemon, handle)
        if found is not self._compute:
            log.info("An earlier try's container is on the daemon at %s", found.docker_url)
            self._compute = found
            del self._client, self._daemon

    def _claim(self, launch: StepLaunch) -> None:
        """Note that this try owns the container from now on, so that none before it kills it."""
        self._owner_file = launch.stage.root / OWNER_FILE
        self._owner_file.write_text(self._token, encoding="utf-8")
        self._name = launch.step_run_id

    def _is_owner(self) -> bool:
        try:
            return self._owner_file is None or self._owner_file.read_text("utf-8") == self._token
        except FileNotFoundError:
            return False  # a later try has taken the directories down and begun anew
