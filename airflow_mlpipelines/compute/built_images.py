"""Images that are built from an environment's definition, wherever that is done.

What an environment *is* to the cache is its definition, so that it is the same on every machine, and
before it was ever built.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.compute.base import ResolvedEnvironment, digest_variables
from airflow_mlpipelines.compute.environment_locks import environments_directory, exclusive_lock
from airflow_mlpipelines.compute.recipes import (
    BaseImage,
    base_names,
    count_unpinned,
    describe_packages,
    list_base_digests,
    make_context,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from airflow_mlpipelines.compute.base import BuildGuard, Emit
    from airflow_mlpipelines.compute.build_context import BuildContext
    from airflow_mlpipelines.compute.images import ImageIdentity
    from airflow_mlpipelines.definition.graph import EnvironmentSpec

REPOSITORY = "mlpipelines/env"
USUAL_PLATFORM = "amd64"
LABEL = "airflow-mlpipelines.environment"
"""Has the digest of the definition on every image that was built."""
_BASE_REPOSITORY = "mlpipelines/base"


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

    def tag(self, platform: str) -> str:
        """Return its tag: one definition is another image on another kind of processor, such as ``arm64``."""
        suffix = "" if platform == USUAL_PLATFORM else f"-{platform}"
        return f"{self.context.digest}{suffix}"

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


def define(
    environment: EnvironmentSpec, *, default: str | None, find: Callable[[str], ImageIdentity]
) -> ImageDefinition:
    """Return the image that an environment comes down to.

    Args:
        environment: One that needs a build.
        default: The image of the compute, to build upon where the environment names none.
        find: Returns what the name of a base stands for.

    Raises:
        EnvironmentBuildError: It has no base, or can't be built anywhere.
    """
    bases = {name: find(name) for name in base_names(environment, default=default)}
    problems = [base.problem for base in bases.values() if base.digest is None]
    context = make_context(environment, _base_images(bases))
    return ImageDefinition(environment, bases, context, problems[0] if problems else None)


def recall(
    environment: EnvironmentSpec,
    description: Mapping[str, Any],
    *,
    default: str | None,
    find: Callable[[str, str], ImageIdentity],
) -> ImageDefinition:
    """Return the image as it was defined when the environment was described, on the bases of that time.

    Args:
        environment: One that needs a build.
        description: What :meth:`ImageDefinition.resolve` said of it.
        default: As for :func:`define`.
        find: Returns the image that a name stood for, by its name and its digest.

    Raises:
        EnvironmentBuildError: It has no base, or can't be built anywhere.
    """
    names = base_names(environment, default=default)
    digests = list_base_digests(description.get("packages") or {})
    bases = {name: find(name, digest) for name, digest in zip(names, digests, strict=True)}
    context = make_context(environment, _base_images(bases))
    return ImageDefinition(environment, bases, context, problem=None)


@contextmanager
def building_alone(
    definition: ImageDefinition, *, where: str, guard: BuildGuard | None, emit: Emit
) -> Iterator[None]:
    """Keep everybody else from building the same image for the same place until the end of the block.

    Others of this machine wait for a lock on a file; those of other machines for what ``guard`` takes.

    Args:
        definition: The image.
        where: The place that the image is for: a registry, or one daemon.
        guard: Keeps other machines away; None if there are none.
        emit: Takes a line if somebody has to be waited for.
    """
    lock = exclusive_lock(environments_directory() / "images" / definition.context.digest)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        emit(f"Waiting for whoever is building {definition.name} on this machine")
        lock.acquire()
    try:
        key = digest("image-build-v1", [where, definition.context.digest])
        with guard(key, definition.name, emit=emit) if guard is not None else nullcontext():
            yield
    finally:
        lock.release()


def tell_unpinned(environment: EnvironmentSpec, emit: Emit) -> None:
    """Tell how many requirement lines leave open what they come to, if any does."""
    unpinned, lines = count_unpinned(environment)
    if unpinned:
        emit(
            f"{unpinned} of {lines} requirement lines name no exact version: what they came to is fixed by this "
            "image, and not by its definition."
        )


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
