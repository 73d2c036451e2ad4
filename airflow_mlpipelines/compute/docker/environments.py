"""Images that are built from an environment's definition: found where somebody built one, else built once.

They are looked for on the daemon, then in the workspace's registry. What an environment *is* to the cache
is its definition, so that it is the same on every machine, and before it was ever built.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from airflow_mlpipelines.compute.base import (
    ResolvedEnvironment,
    digest_variables,
    name_environment,
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
from airflow_mlpipelines.compute.environments import environments_directory, exclusive_lock
from airflow_mlpipelines.compute.recipes import (
    BaseImage,
    base_names,
    count_unpinned,
    describe_packages,
    list_base_digests,
    make_context,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.compute.build_context import BuildContext
    from airflow_mlpipelines.compute.images import ImageIdentity
    from airflow_mlpipelines.definition.graph import (
        DockerComputeSpec,
        EnvironmentSpec,
        RegistrySpec,
    )

REPOSITORY = "mlpipelines/env"
LABEL = "airflow-mlpipelines.environment"
_BASE_REPOSITORY = "mlpipelines/base"
_USUAL_PLATFORM = "amd64"


@dataclass(frozen=True)
class ImageDefinition:
    """An image that is to be there, whether it is yet or not.

    Attributes:
        environment: What it is made from.
        bases: What its bases' names stand for.
        context: What it is built from.
        problem: Why it can't be known what it will be, in words; None if it is known.
    """

    environment: EnvironmentSpec
    bases: Mapping[str, ImageIdentity]
    context: BuildContext
    problem: str | None

    @property
    def name(self) -> str:
        """Its name on a daemon."""
        return f"{REPOSITORY}:{self.context.digest}"

    @property
    def local_bases(self) -> dict[str, str]:
        """The ids of bases that are in no registry, and the names by which its Dockerfile calls them."""
        identities = self.bases.values()
        return {
            item.reference: _local_base(item.reference)
            for item in identities
            if item.reference == item.digest
        }

    def resolve(self, image: str | None = None) -> ResolvedEnvironment:
        """Return what counts of it for the cache; ``image`` is the reference to run, once it is there."""
        bases = _base_images(self.bases)
        return ResolvedEnvironment(
            description={
                "kind": "image",
                "image": self.name,
                "digest": f"definition:{self.context.digest}",
                "packages": describe_packages(self.environment, bases),
                "variables": digest_variables(self.environment),
            },
            image=image or self.name,
            cacheable=self.problem is None,
            problem=self.problem,
        )


def define_image(
    environment: EnvironmentSpec, compute: DockerComputeSpec, *, timeout: int
) -> ImageDefinition:
    """Return the image that an environment comes down to. Bases are asked for, nothing is fetched.

    Raises:
        EnvironmentBuildError: It has no base, or can't be built anywhere.
    """
    names = base_names(environment, default=compute.image)
    bases = {name: find_image(name, compute, timeout=timeout) for name in names}
    problems = [base.problem for base in bases.values() if base.digest is None]
    context = make_context(environment, _base_images(bases))
    return ImageDefinition(environment, bases, context, problems[0] if problems else None)


def recall_definition(
    environment: EnvironmentSpec, compute: DockerComputeSpec, description: Mapping[str, Any]
) -> ImageDefinition:
    """Return the image as it was defined when the environment was described, on the bases of that time.

    Raises:
        EnvironmentBuildError: It has no base, or can't be built anywhere.
        ComputeUnavailableError: The daemon does not answer.
    """
    client = connect(compute)
    names = base_names(environment, default=compute.image)
    digests = list_base_digests(description.get("packages") or {})
    bases = {
        name: recall_image(client, name, digest)
        for name, digest in zip(names, digests, strict=True)
    }
    return ImageDefinition(
        environment, bases, make_context(environment, _base_images(bases)), problem=None
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
    definition: ImageDefinition, compute: DockerComputeSpec, *, emit: Emit
) -> tuple[ImageDefinition, ImageIdentity]:
    """Return the image, on the daemon now: found there, pulled, or built and pushed.

    Where the workspace has a registry, its image counts, and the daemon's own only until it is there.

    Returns:
        The definition, with bases that were unknown before known now; and the image.

    Raises:
        EnvironmentBuildError: It can't be built, or not be pushed.
        ComputeUnavailableError: The daemon or the registry does not answer.
    """
    client = connect(compute)
    if definition.problem is not None:
        _pull_bases(definition, compute, client, emit)
        definition = define_image(definition.environment, compute, timeout=60)
    found = _find_on_daemon(definition, compute, client)
    if found is None:
        found = _provide_alone(definition, compute, client, emit)
    return definition, found


def _provide_alone(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient, emit: Emit
) -> ImageIdentity:
    """Pull the image or build it, while nobody else on this machine does."""
    lock = exclusive_lock(environments_directory() / "images" / definition.context.digest)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        emit(f"Waiting for whoever is building {definition.name} on this machine")
        lock.acquire()
    try:
        return (
            _find_on_daemon(definition, compute, client)
            or _pull_built(definition, compute, client, emit)
            or _build(definition, compute, client, emit)
        )
    finally:
        lock.release()


def _find_on_daemon(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient
) -> ImageIdentity | None:
    if compute.registry is None:
        return local_image(client, _tag(definition, client))
    found = local_image(client, _registry_name(definition, compute.registry, client))
    # Tagged, but never pushed: the push failed, and is still to be done.
    return found if found is not None and "@" in found.reference else None


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
    return local_image(client, reference)


def _build(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient, emit: Emit
) -> ImageIdentity:
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
    return local_image(client, reference) or found


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
    unpinned, lines = count_unpinned(environment)
    if unpinned:
        emit(
            f"{unpinned} of {lines} requirement lines name no exact version: what they came to is fixed by this "
            "image, and not by its definition."
        )
    return found


def _pull_bases(
    definition: ImageDefinition, compute: DockerComputeSpec, client: APIClient, emit: Emit
) -> None:
    for base in definition.bases.values():
        if local_image(client, base.reference) is None:
            pull_image(connect(compute, conn_id=pull_conn_id(compute)), base.reference, emit=emit)


def _base_images(bases: Mapping[str, ImageIdentity]) -> dict[str, BaseImage]:
    return {
        name: BaseImage(
            _local_base(base.reference) if base.reference == base.digest else base.reference,
            base.digest,
        )
        for name, base in bases.items()
    }


def _local_base(image_id: str) -> str:
    """Return the name under which an image that is in no registry can be built upon: an id can't be."""
    return f"{_BASE_REPOSITORY}:{image_id.removeprefix('sha256:')[:32]}"


def _tag(definition: ImageDefinition, client: APIClient) -> str:
    return f"{REPOSITORY}:{_version(definition, client)}"


def _registry_name(definition: ImageDefinition, registry: RegistrySpec, client: APIClient) -> str:
    return f"{registry.url}:{_version(definition, client)}"


def _version(definition: ImageDefinition, client: APIClient) -> str:
    """Return the image's tag: one definition is another image on another kind of processor."""
    platform = client.version().get("Arch", _USUAL_PLATFORM)
    suffix = "" if platform == _USUAL_PLATFORM else f"-{platform}"
    return f"{definition.context.digest}{suffix}"


def _conn_id(compute: DockerComputeSpec) -> str | None:
    own = compute.registry.conn_id if compute.registry is not None else None
    return own or compute.conn_id


def _registry_client(compute: DockerComputeSpec) -> APIClient:
    return connect(compute, conn_id=_conn_id(compute))
