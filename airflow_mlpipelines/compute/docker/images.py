"""Images by digest: what a name means on this daemon or in its registry, and fetching it."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.docker.daemon import connect, daemon_url, unreachable
from airflow_mlpipelines.compute.images import (
    ImageIdentity,
    ImageName,
    is_same_repository,
    pinned_image,
    repository_of,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, EnvironmentBuildError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

log = logging.getLogger(__name__)

_ASK_SECONDS = 6
_SLOW_SECONDS = 1.0
_SILENT_SECONDS = 60.0
_silent: dict[tuple[str, str], float] = {}
"""By daemon and registry: until when one that let us wait in vain is not asked again by this process."""
_DENIED = re.compile(r"denied|unauthorized|authentication required|no basic auth|forbidden", re.I)
_ABSENT = re.compile(
    r"manifest unknown|not found|does not exist|no such image|invalid reference", re.I
)
# Of a repository that nobody pushed to yet, registries that know who asks say that it may not be read.
_NO_REPOSITORY = re.compile(r"name unknown|repository.*(not known|does not exist)", re.I)
_PROGRESS = frozenset({"Downloading", "Extracting", "Waiting", "Pushing", "Preparing"})


def find_image(name: str, compute: DockerComputeSpec, *, timeout: int) -> ImageIdentity:
    """Return what ``name`` stands for; where it can't be found out, the reason.

    An image that came from its registry is looked up there again: its tag may have moved. Where the registry
    does not tell, the daemon's own counts, which the log says. One that was only ever made here stays that.
    """
    pinned = pinned_image(name)
    if pinned is not None:
        return pinned
    try:
        local = local_image(connect(compute, timeout=timeout), name)
        if local is None:
            found = _ask_registry(name, compute, timeout=timeout)
            problem = f"it is not on the Docker daemon, and {found.problem}"
            return found if found.digest is not None else replace(found, problem=problem)
        if not is_same_repository(local.reference, name):
            return local
        return _ask_again(name, compute, local)
    except ComputeUnavailableError as error:
        return ImageIdentity(name, None, str(error))
    except OSError as error:  # docker's and requests' errors are OSErrors
        return ImageIdentity(name, None, str(unreachable(compute, str(error))))


def _ask_registry(name: str, compute: DockerComputeSpec, *, timeout: int) -> ImageIdentity:
    client = connect(compute, conn_id=pull_conn_id(compute), timeout=timeout)
    return registry_image(client, name)


def _ask_again(name: str, compute: DockerComputeSpec, local: ImageIdentity) -> ImageIdentity:
    """Return what the registry says of an image that the daemon has; the daemon's if it says nothing soon."""
    place = (daemon_url(compute), ImageName.parse(name).registry)
    began = time.monotonic()
    if began < _silent.get(place, began):
        found = ImageIdentity(name, None, f"the registry {place[1]} has not answered a moment ago")
    else:
        try:
            found = _ask_registry(name, compute, timeout=_ASK_SECONDS)
        except ComputeUnavailableError as error:
            found = ImageIdentity(name, None, str(error))
        if found.digest is not None:
            return found
        if time.monotonic() - began > _SLOW_SECONDS:
            # A run has many images: it waits for this registry once.
            _silent[place] = time.monotonic() + _SILENT_SECONDS
    log.log(
        logging.INFO if _ABSENT.search(found.problem or "") else logging.WARNING,
        "The tag of image %r can't be looked up, and stands for what is on the Docker daemon (%s): %s",
        name,
        local.digest,
        found.problem,
    )
    return local


def pull_conn_id(compute: DockerComputeSpec) -> str | None:
    """Return the Airflow connection to pull with: the compute's, else that of the workspace's registry."""
    return compute.conn_id or (compute.registry.conn_id if compute.registry is not None else None)


def recall_image(client: APIClient, name: str, digest: str) -> ImageIdentity:
    """Return the image that ``name`` stood for when its digest was taken."""
    local = local_image(client, name)
    if local is not None and local.digest == digest:
        return local
    if local_image(client, digest) is not None:
        return ImageIdentity(digest, digest)  # the id of one that is in no registry
    return ImageIdentity(f"{repository_of(name)}@{digest}", digest)


def local_image(client: APIClient, name: str) -> ImageIdentity | None:
    """Return what ``name`` means on the daemon, or None if it has no such image."""
    from docker.errors import NotFound

    try:
        image = client.inspect_image(name)  # type: ignore[no-untyped-call]
    except NotFound:
        return None
    references = sorted(image.get("RepoDigests") or ())
    own = [reference for reference in references if is_same_repository(reference, name)]
    for reference in (*own, *references):
        return ImageIdentity(reference, reference.partition("@")[2])
    return ImageIdentity(image["Id"], image["Id"])


def registry_image(client: APIClient, name: str) -> ImageIdentity:
    """Return what ``name`` means in its registry, without fetching it; the reason if that fails."""
    try:
        found = client.inspect_distribution(name)  # type: ignore[no-untyped-call]
        digest = found["Descriptor"]["digest"]
    except (OSError, KeyError) as error:  # docker's and requests' errors are OSErrors
        said = getattr(error, "explanation", None) or str(error)
        return ImageIdentity(name, None, f"the registry of image {name!r} says: {said}")
    return ImageIdentity(f"{repository_of(name)}@{digest}", digest)


def seek_image(client: APIClient, name: str) -> ImageIdentity | None:
    """Return what ``name`` means in its registry, or None if the registry answers that it has none.

    Raises:
        ComputeUnavailableError: The registry does not answer, or these credentials may not look.
    """
    found = registry_image(client, name)
    if found.digest is not None:
        return found
    said = found.problem or ""
    if _ABSENT.search(said) or _NO_REPOSITORY.search(said):
        return None
    raise ComputeUnavailableError(
        f"The registry of image {name!r} can't be asked for it: {said}. Check the daemon's way to it, and the "
        "conn_id of the workspace's registry (an Airflow connection of type docker)."
    )


def push_image(client: APIClient, name: str, *, conn_id: str | None, emit: Emit) -> None:
    """Put ``name`` into its registry, reporting each layer as it is begun and done.

    Raises:
        EnvironmentBuildError: These credentials may not push there.
        ComputeUnavailableError: The registry can't be reached.
    """
    emit(f"Pushing image {name}")
    repository, _, tag = name.rpartition(":")
    try:
        for message in report_layers(
            client.push(repository, tag=tag, stream=True, decode=True), emit
        ):
            raise push_failure(name, message, conn_id)
    except OSError as error:  # docker's and requests' errors are OSErrors
        said = getattr(error, "explanation", None) or str(error)
        raise push_failure(name, said, conn_id) from error
    emit(f"Pushed image {name}")


def push_failure(
    name: str, said: str, conn_id: str | None
) -> EnvironmentBuildError | ComputeUnavailableError:
    """Return the error that an image could not be put into its registry, and what to do about it."""
    if _DENIED.search(said):
        who = f"The Airflow connection {conn_id!r} may not" if conn_id else "Nobody unknown may"
        return EnvironmentBuildError(
            f"The image {name!r} was built, but can't be pushed. {who} push there: name a connection that may as "
            f"conn_id of the workspace's registry. The registry says: {said}"
        )
    return ComputeUnavailableError(
        f"The image {name!r} was built, but can't be pushed: {said}. Check the daemon's way to the registry; the "
        "next try pushes it without building it again."
    )


def pull_image(client: APIClient, name: str, *, emit: Emit) -> None:
    """Fetch ``name``, reporting each layer as it is begun and done.

    Raises:
        EnvironmentBuildError: There is no such image, or these credentials may not have it.
        ComputeUnavailableError: The registry can't be reached.
    """
    emit(f"Pulling image {name}")
    try:
        for said in report_layers(client.pull(name, stream=True, decode=True), emit):
            raise _pull_failure(name, said)
    except OSError as error:
        raise _pull_failure(name, getattr(error, "explanation", None) or str(error)) from error
    emit(f"Pulled image {name}")


def report_layers(messages: Iterable[Any], emit: Emit) -> Iterator[str]:
    """Report what happens to each layer, as it is begun and done; yield what the registry complains of."""
    latest: dict[str, str] = {}
    for message in messages:
        if "error" in message:
            yield str(message["error"])
        layer, status = message.get("id", ""), message.get("status", "")
        if not status or status in _PROGRESS or latest.get(layer) == status:
            continue
        latest[layer] = status
        emit(f"{layer}: {status}" if layer else status)


def _pull_failure(name: str, said: str) -> EnvironmentBuildError | ComputeUnavailableError:
    if name.startswith("sha256:"):
        return EnvironmentBuildError(
            f"The image {name} is on no registry, and the Docker daemon has it no more. Build it again, "
            "or push it to a registry and name it from there."
        )
    if _DENIED.search(said):
        return EnvironmentBuildError(
            f"The image {name!r} does not exist, or may not be pulled without other credentials. Check its "
            f"name, and the compute's conn_id (an Airflow connection of type docker). The registry says: {said}"
        )
    if _ABSENT.search(said):
        return EnvironmentBuildError(
            f"The image {name!r} does not exist. Check its name and tag. The registry says: {said}"
        )
    return ComputeUnavailableError(
        f"The image {name!r} is not on the Docker daemon and can't be pulled: {said}. Check the daemon's way "
        "to the registry, or put the image on the daemon beforehand."
    )
