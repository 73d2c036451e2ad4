"""The container of one step: what it is asked to be, and the provider's operator that makes it."""

from __future__ import annotations

import io
import posixpath
import shlex
import tarfile
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import (
    CODE,
    HOME,
    HOME_VARIABLES,
    LABEL_PREFIX,
    OUTPUTS,
    ROOT,
    RUN,
    RUNTIME,
    STEP_RUN_LABEL,
    choose_shm_size,
    input_target,
)
from airflow_mlpipelines.compute.docker.gpus import device_requests
from airflow_mlpipelines.compute.docker.users import find_uid, hand_over
from airflow_mlpipelines.exceptions import DataError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Stage, StepLaunch
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

SECRETS = f"{ROOT}/secrets/environment"
SHELL = "/bin/sh"
_READ_SECRETS = '. "$1"; rm -f "$1" 2>/dev/null; shift; exec "$@"'
DEFAULT_NETWORKS = (None, "", "default", "bridge")
_NANO = 1_000_000_000
# The log is read while it is written, and from its beginning after a worker was lost: no rotation,
# whatever the daemon's own default is, but an end to what a program gone wild can fill.
_LOG_OPTIONS = {"max-size": "10g", "max-file": "1", "compress": "false"}


@dataclass(frozen=True)
class BindMount:
    """A file or directory of the host, and where the container sees it."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class ContainerSpec:
    """What is asked of the daemon for one step run.

    Attributes:
        image: The reference to run, by digest where it is known.
        image_name: The image as people call it.
        user: The worker's ``uid:gid``, or whom the compute names.
        memory: Bytes; swap does not come on top.
        gpus: How many it gets.
        gpu_ids: Which ones, as chosen when it is started.
        network: A network of the step's own, where it is found as ``hostname``.
    """

    name: str
    image: str
    image_name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    secrets: Mapping[str, str] = field(repr=False)
    mounts: tuple[BindMount, ...]
    user: str
    labels: Mapping[str, str]
    cpus: float | None = None
    memory: int | None = None
    shm_size: int | None = None
    gpus: int = 0
    gpu_ids: tuple[str, ...] = ()
    network_mode: str | None = None
    extra_hosts: Mapping[str, str] = field(default_factory=dict)
    network: str | None = None
    hostname: str | None = None


def plan_container(
    launch: StepLaunch, compute: DockerComputeSpec, *, image_name: str, user: str
) -> ContainerSpec:
    """Return what to ask of the daemon for ``launch``; what the step leaves open, the compute says."""
    wanted = launch.resources
    stage = launch.stage
    memory = wanted.memory if wanted.memory is not None else compute.memory
    gpus = wanted.gpus or 0
    shm_size = choose_shm_size(wanted, default=compute.shm_size, gpus=gpus, memory=memory)
    mounts = [
        BindMount(str(stage.code), CODE),
        BindMount(str(stage.run), RUN),
        BindMount(str(stage.outputs_root), OUTPUTS),
        BindMount(str(stage.runtime), RUNTIME, read_only=True),
    ]
    mounts += [
        BindMount(str(path), input_target(name, path), read_only=True)
        for name, path in stage.inputs.items()
    ]
    env = dict(launch.env)
    if needs_home(user) and "HOME" not in env:
        mounts.append(BindMount(str(home_directory(stage)), HOME))
        env = {**HOME_VARIABLES, **env}
    labels = {f"{LABEL_PREFIX}{name}": value for name, value in launch.labels.items()}
    return ContainerSpec(
        name=launch.step_run_id,
        image=launch.image or image_name,
        image_name=image_name,
        argv=launch.argv,
        env=env,
        secrets=launch.secrets,
        mounts=tuple(mounts),
        user=user,
        labels={**labels, STEP_RUN_LABEL: launch.step_run_id},
        cpus=wanted.cpus if wanted.cpus is not None else compute.cpus,
        memory=memory,
        shm_size=shm_size,
        gpus=gpus,
        network_mode=compute.network_mode,
        extra_hosts=compute.extra_hosts,
    )


def home_directory(stage: Stage) -> Path:
    """Return the directory on the host that is the home of a user without one."""
    return stage.root / "home"


def prepare_directories(client: APIClient, launch: StepLaunch, spec: ContainerSpec) -> int:
    """Return the number of the user that a container of ``spec`` runs as, who may write the step's directories now.

    Raises:
        StepFailedError: There is no such user, or the worker can't give them to it.
    """
    stage = launch.stage
    home = home_directory(stage)
    try:
        uid = find_uid(client, spec.image, spec.user)
        home.mkdir(exist_ok=True)
        hand_over([stage.code, stage.run, stage.outputs_root, home], uid)
    except DataError as error:
        raise StepFailedError(launch.step_name, str(error), retryable=False) from error
    return uid


def needs_home(user: str) -> bool:
    """Return whether ``user`` is a bare number other than root's, which has no home in an image."""
    uid = user.partition(":")[0]
    return uid.isdecimal() and int(uid) != 0


def make_container(spec: ContainerSpec, client: APIClient, *, uid: int) -> str:
    """Return the id of a container made for ``spec``, not yet started."""
    operator = _operator_class()(
        task_id=spec.name,
        image=spec.image,
        command=list(spec.argv),
        container_name=spec.name,
        environment=dict(spec.env),
        private_environment=dict(spec.secrets),
        mount_tmp_dir=False,
        auto_remove="never",
        working_dir=CODE,
        user=spec.user,
        shm_size=spec.shm_size,
        network_mode=spec.network or spec.network_mode,
        hostname=spec.hostname,
        extra_hosts=dict(spec.extra_hosts),
        device_requests=device_requests(spec.gpus, spec.gpu_ids) or None,
        labels=dict(spec.labels),
    )
    return str(operator.make(spec, client, uid))


def secrets_archive(secrets: Mapping[str, str], uid: int) -> bytes:
    """Return a tar archive for a container's root that holds the secrets, for ``uid`` alone to read."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in secrets.items()]
    content = "".join(lines).encode("utf-8", "surrogateescape")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, mode, owner in (
            (ROOT, 0o755, 0),
            (posixpath.dirname(SECRETS), 0o700, uid),
        ):
            directory = tarfile.TarInfo(path.lstrip("/"))
            directory.type, directory.mode, directory.uid = tarfile.DIRTYPE, mode, owner
            archive.addfile(directory)
        file = tarfile.TarInfo(SECRETS.lstrip("/"))
        file.mode, file.uid, file.size = 0o400, uid, len(content)
        archive.addfile(file, io.BytesIO(content))
    return buffer.getvalue()


def _networking(spec: ContainerSpec, client: Any) -> Any:
    if spec.network is None:
        return None
    endpoint = client.create_endpoint_config(aliases=[spec.hostname])
    return client.create_networking_config({spec.network: endpoint})


@cache
def _operator_class() -> type[Any]:
    """Return the subclass of the provider's operator; made on first use, as its import is not free."""
    from airflow.providers.docker.operators.docker import DockerOperator
    from docker.types import LogConfig, Mount

    class StepContainerOperator(DockerOperator):
        """Makes a container for a step and leaves it to its launcher, which never executes it.

        Of the provider's operator it keeps the declaration of a container. It replaces how one is made
        of it: with limits that are limits, with an init, and with the secrets outside its configuration.
        """

        def make(self, spec: ContainerSpec, client: APIClient, uid: int) -> str:
            secrets = self._private_environment
            prefix = [SHELL, "-c", _READ_SECRETS, SHELL, SECRETS] if secrets else []
            # Through the entrypoint: one that the image has may not come before what the step declares.
            program, *arguments = [*prefix, *spec.argv]
            self.container = client.create_container(
                image=self.image,
                name=self.container_name,
                entrypoint=[program],
                command=arguments,
                environment=self.environment,
                working_dir=self.working_dir,
                user=self.user,
                labels=self.labels,
                hostname=self.hostname,
                networking_config=_networking(spec, client),
                host_config=client.create_host_config(
                    mounts=[
                        Mount(mount.target, mount.source, type="bind", read_only=mount.read_only)
                        for mount in spec.mounts
                    ],
                    nano_cpus=round(spec.cpus * _NANO) if spec.cpus is not None else None,
                    mem_limit=spec.memory,
                    memswap_limit=spec.memory,
                    shm_size=self.shm_size,
                    network_mode=self.network_mode,
                    extra_hosts=self.extra_hosts,
                    device_requests=self.device_requests,
                    log_config=LogConfig(type=LogConfig.types.JSON, config=_LOG_OPTIONS),
                    init=True,
                ),
            )
            container = str(self.container["Id"])
            if spec.network and spec.network_mode not in DEFAULT_NETWORKS:
                client.connect_container_to_network(container, spec.network_mode)
            if secrets:
                client.put_archive(container, "/", secrets_archive(secrets, uid))
            return container

    return StepContainerOperator
