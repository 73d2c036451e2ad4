"""Images that are built from an environment's definition: found where somebody built one, else built once.

They are looked for on the daemon, then in the workspace's registry.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.compute.base import name_environment
from airflow_mlpipelines.compute.built_images import (
    LABEL,
    REPOSITORY,
    USUAL_PLATFORM,
    ImageDefinition,
    building_alone,
    define,
    recall,
    tell_unpinned,
)
from airflow_mlpipelines.compute.docker.builds import build_image
from airflow_mlpipelines.compute.docker.daemon import connect
from airflow_mlpipelines.compute.docker.images import (
    find_image,
    local_image,
    pull_conn_id,
    pull_image,
    push_image,
    recall_image,
    seek_image,
)
from airflow_mlpipelines.compute.environment_locks import environments_directory, write_whole
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from docker import APIClient

    from airflow_mlpipelines.compute.base import BuildGuard, Emit
    from airflow_mlpipelines.compute.images import ImageIdentity
    from airflow_mlpipelines.definition.graph import (
        DockerComputeSpec,
        EnvironmentSpec,
        RegistrySpec,
    )


def define_image(
    environment: EnvironmentSpec, compute: DockerComputeSpec, *, timeout: int
) -> ImageDefinition:
    """Return the image that an environment comes down to. Bases are asked for, nothing is fetched.

    Raises:
        EnvironmentBuildError: It has no base, or can't be built anywhere.
    """
    return define(
        environment,
        default=compute.image,
        find=lambda name: find_image(name, compute, timeout=timeout),
    )


def recall_definition(
    environment: EnvironmentSpec, compute: DockerComputeSpec, description: Mapping[str, Any]
) -> ImageDefinition:
    """Return the image as it was defined when the environment was described, on the bases of that time.

    Raises:
        EnvironmentBuildError: It has no base, or can't be built anywhere.
        ComputeUnavailableError: The daemon does not answer.
    """
    client = connect(compute)
    return recall(
        environment,
        description,
        default=compute.image,
        find=lambda name, known: recall_image(client, name, known),
    )


def find_built(definition: ImageDefinition, compute: DockerComputeSpec) -> str | None:
    """Return where the image is: ``daemon``, ``registry``, or None if it is not built.

    Raises:
        ComputeUnavailableError: The daemon or the registry does not answer.
    """
    client = connect(compute)
    if local_image(client, _tag(definition, client)) is not None:
        return "daemon"
    if compute.registry is None:
        return None
    reference = _registry_name(definition, compute.registry, client)
    if local_image(client, reference) is not None:
        return "daemon"
    return "registry" if seek_image(_registry_client(compute), reference) else None


def provide_image(
    definition: ImageDefinition,
    compute: DockerComputeSpec,
    *,
    emit: Emit,
    guard: BuildGuard | None = None,
) -> tuple[ImageDefinition, ImageIdentity]:
    """Return the image, on the daemon now: found there, pulled, or built and pushed.

    Where the workspace has a registry, its image counts, and the daemon's own only until it is there.

    Args:
        definition: The image.
        compute: The compute.
        emit: Takes the build's log.
        guard: Keeps other machines from building the same meanwhile.

    Returns:
        The definition, with bases that were unknown before known now; and the image.

    Raises:
        EnvironmentBuildError: It can't be built, or not be pushed.
        ComputeUnavailableError: The daemon or the registry does not answer.
    """
    client = connect(compute)
    definition = settle_bases(definition, compute, client, emit)
    found = _find_on_daemon(definition, compute, client)
    if found is None:
        # Without a registry, only those who use the same daemon can build the same for each other.
        where = compute.registry.url if compute.registry is not None else client.info()["ID"]
        with building_alone(definition, where=where, guard=guard, emit=emit):
            found = (
                _find_on_daemon(definition, compute, client)
                or _pull_built(definition, compute, client, emit)
                or build_and_push(definition, compute, client, emit)
            )
    return definition, found


def settle_bases(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient, emit: Emit
) -> ImageDefinition:
    """Return the definition with bases that are known: those that were not are on the daemon now.

    Raises:
        EnvironmentBuildError: There is no such base, or it may not be pulled.
        ComputeUnavailableError: Its registry does not answer.
    """
    if definition.problem is None:
        return definition
    _pull_bases(definition, compute, client, emit)
    return define_image(definition.environment, compute, timeout=60)


def _find_on_daemon(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient
) -> ImageIdentity | None:
    """Return the image on the daemon, unless it is still to be put into the compute's registry.

    That it is there already, the daemon does not tell: one with containerd's image store names a digest for
    every tag, pushed or not. So the registry is asked, once per machine.
    """
    if compute.registry is None:
        return local_image(client, _tag(definition, client))
    reference = _registry_name(definition, compute.registry, client)
    found = local_image(client, reference)
    if found is None or found.digest is None:
        return None
    note = _pushed_note(reference, found.digest)
    if not note.exists():
        try:
            theirs = seek_image(_registry_client(compute), reference)
        except ComputeUnavailableError:
            # Good enough to run on; the next step asks again.
            return found if "@" in found.reference else None
        if theirs is None or theirs.digest != found.digest:
            return None
        write_whole(note, reference)
    return found


def _pull_built(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient, emit: Emit
) -> ImageIdentity | None:
    """Return the registry's image, pulled, or None if it has none."""
    if compute.registry is None:
        return None
    reference = _registry_name(definition, compute.registry, client)
    puller = _registry_client(compute)
    if seek_image(puller, reference) is None:
        return None
    pull_image(puller, reference, emit=emit)
    return _note_pushed(client, reference)


def _note_pushed(client: APIClient, reference: str) -> ImageIdentity | None:
    """Return the image that the daemon and the registry have as ``reference``; that they do is remembered."""
    found = local_image(client, reference)
    if found is not None and found.digest is not None:
        write_whole(_pushed_note(reference, found.digest), reference)
    return found


def _pushed_note(reference: str, image: str) -> Path:
    """Return the file that is there once this machine knows that the registry has the image."""
    key = digest("pushed-image-v1", [reference, image])
    return environments_directory() / "pushed" / key[:32]


def build_and_push(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient, emit: Emit
) -> ImageIdentity:
    """Return the image, built unless the daemon has it, and put into the compute's registry if it names one.

    Raises:
        EnvironmentBuildError: It can't be built, or not be pushed.
        ComputeUnavailableError: The daemon or the registry does not answer.
    """
    tag = _tag(definition, client)
    found = local_image(client, tag)
    if found is None:
        found = _build_now(definition, compute, client, tag, emit)
    if compute.registry is None:
        return found
    # Somebody on another machine may have been quicker: whose is in the registry is everybody's.
    theirs = _pull_built(definition, compute, client, emit)
    if theirs is not None:
        return theirs
    reference = _registry_name(definition, compute.registry, client)
    repository, _, version = reference.rpartition(":")
    client.tag(tag, repository, version)
    push_image(_registry_client(compute), reference, conn_id=_conn_id(compute), emit=emit)
    return _note_pushed(client, reference) or found


def _build_now(
    definition: ImageDefinition,
    compute: DockerComputeSpec,
    client: APIClient,
    tag: str,
    emit: Emit,
) -> ImageIdentity:
    environment = definition.environment
    named = name_environment(environment)
    _pull_bases(definition, compute, client, emit)
    for image_id, name in definition.local_bases.items():
        repository, _, version = name.partition(":")
        client.tag(image_id, repository, version)
    emit(f"Building image {tag} for {named}. This is done once.")
    began = time.monotonic()
    build_image(
        client,
        compute,
        definition.context,
        tag=tag,
        labels={LABEL: definition.context.digest},
        named=named,
        emit=emit,
    )
    found = local_image(client, tag)
    if found is None:
        raise ComputeUnavailableError(
            f"The Docker daemon ended the build of {named} without an image. It was stopped, or has no room."
        )
    emit(f"Built image {tag} ({found.digest}) in {time.monotonic() - began:.1f} s")
    tell_unpinned(environment, emit)
    return found


def _pull_bases(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient, emit: Emit
) -> None:
    for base in definition.bases.values():
        if local_image(client, base.reference) is None:
            pull_image(connect(compute, conn_id=pull_conn_id(compute)), base.reference, emit=emit)


def _tag(definition: ImageDefinition, client: APIClient) -> str:
    return f"{REPOSITORY}:{_version(definition, client)}"


def _registry_name(definition: ImageDefinition, registry: RegistrySpec, client: APIClient) -> str:
    return f"{registry.url}:{_version(definition, client)}"


def _version(definition: ImageDefinition, client: APIClient) -> str:
    return definition.tag(daemon_platform(client))


def daemon_platform(client: APIClient) -> str:
    """Return the kind of processor that the daemon's images are for, such as ``amd64``."""
    return str(client.version().get("Arch", USUAL_PLATFORM))


def _conn_id(compute: DockerComputeSpec) -> str | None:
    own = compute.registry.conn_id if compute.registry is not None else None
    return own or compute.conn_id


def _registry_client(compute: DockerComputeSpec) -> APIClient:
    return connect(compute, conn_id=_conn_id(compute))
