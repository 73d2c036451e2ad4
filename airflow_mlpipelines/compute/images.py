"""Images: what a name says, and what it stood for when somebody looked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.base import ResolvedEnvironment, digest_variables
from airflow_mlpipelines.exceptions import EnvironmentBuildError

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import (
        DockerComputeSpec,
        EnvironmentSpec,
        KubernetesComputeSpec,
    )

DOCKER_HUB = "docker.io"
_HUB_NAMES = frozenset({"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})
_DEFAULT_TAG = "latest"
_BY_DIGEST = re.compile(r"^(?:.+@)?(sha256:[0-9a-f]{64})$")


@dataclass(frozen=True)
class ImageIdentity:
    """What an image's name stands for at this moment.

    Attributes:
        reference: What to run: by digest where it is known, else the name itself.
        digest: ``sha256:…`` of the manifest; of an image that is in no registry, its id. None if
            it is not known.
        problem: Why it is not known, in words.
    """

    reference: str
    digest: str | None
    problem: str | None = None


@dataclass(frozen=True)
class ImageName:
    """The parts of an image's name, with what Docker adds to short ones.

    Attributes:
        registry: Host, and port if one is named; ``docker.io`` where the name has none.
        repository: The path on the registry.
        version: A tag, or a digest.
    """

    registry: str
    repository: str
    version: str

    @classmethod
    def parse(cls, name: str) -> ImageName:
        """Return the parts of ``name``.

        Example:
            >>> ImageName.parse("python:3.12")
            ImageName(registry='docker.io', repository='library/python', version='3.12')
        """
        repository = repository_of(name)
        version = name[len(repository) :].rpartition("@" if "@" in name else ":")[2]
        head, slash, rest = repository.partition("/")
        if not slash or not ("." in head or ":" in head or head == "localhost"):
            head, rest = DOCKER_HUB, repository
        registry = normal_registry(head)
        if registry == DOCKER_HUB and "/" not in rest:
            rest = f"library/{rest}"
        return cls(registry, rest, version or _DEFAULT_TAG)


def normal_registry(host: str) -> str:
    """Return a registry's host as :class:`ImageName` has it, from a host or an address in a connection."""
    host = re.sub(r"^https?://", "", host.strip()).partition("/")[0].lower()
    return DOCKER_HUB if host in _HUB_NAMES else host


def repository_of(name: str) -> str:
    """Return ``name`` without tag and digest."""
    name = name.partition("@")[0]
    head, colon, tail = name.rpartition(":")
    return head if colon and "/" not in tail else name


def is_same_repository(one: str, other: str) -> bool:
    """Return whether two images' names are of one repository of one registry, however they are written."""
    first, second = ImageName.parse(one), ImageName.parse(other)
    return (first.registry, first.repository) == (second.registry, second.repository)


def image_name(
    environment: EnvironmentSpec | None, compute: DockerComputeSpec | KubernetesComputeSpec
) -> str:
    """Return the name of the image that a step of this environment runs on.

    Raises:
        EnvironmentBuildError: Nobody names one.
    """
    name = (environment.image if environment is not None else None) or compute.image
    if name is None:
        raise EnvironmentBuildError(
            f"compute {compute.name!r} has no image, and neither has the step's environment. Give one of "
            "them an image=."
        )
    return name


def pinned_image(name: str) -> ImageIdentity | None:
    """Return the identity of a ``name`` that says the digest itself, else None."""
    match = _BY_DIGEST.match(name)
    return ImageIdentity(name, match[1]) if match else None


def resolve_image(
    name: str, identity: ImageIdentity, environment: EnvironmentSpec | None
) -> ResolvedEnvironment:
    """Return the environment that is one image.

    Args:
        name: The image as people call it.
        identity: What it stands for.
        environment: What asks for it, with the variables of its processes.
    """
    return ResolvedEnvironment(
        description={
            "kind": "image",
            "image": name,
            "digest": identity.digest,
            "variables": digest_variables(environment),
        },
        image=identity.reference,
        cacheable=identity.digest is not None,
        problem=identity.problem,
    )
