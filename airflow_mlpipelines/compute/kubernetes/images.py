"""Images of pods: a tag is looked up in its registry when a run starts, and pods run what it meant then.

The registry is asked over HTTP, so nothing here needs a Docker daemon, except for building an image that
is not in the workspace's registry yet.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import name_environment
from airflow_mlpipelines.compute.built_images import (
    LABEL,
    USUAL_PLATFORM,
    building_alone,
    define,
    recall,
    tell_unpinned,
)
from airflow_mlpipelines.compute.images import (
    ImageIdentity,
    ImageName,
    image_name,
    repository_of,
    resolve_image,
)
from airflow_mlpipelines.compute.kubernetes.pull_secrets import image_conn_ids
from airflow_mlpipelines.compute.registries import find_digest, look_up_image, read_login
from airflow_mlpipelines.definition.graph import DockerComputeSpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, EnvironmentBuildError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from docker import APIClient

    from airflow_mlpipelines.compute.base import BuildGuard, Emit, ResolvedEnvironment
    from airflow_mlpipelines.compute.built_images import ImageDefinition
    from airflow_mlpipelines.definition.graph import (
        EnvironmentSpec,
        KubernetesComputeSpec,
        RegistrySpec,
    )

_PLATFORM_LABEL = "kubernetes.io/arch"


class PodImages:
    """The images of one compute's pods. One instance serves one step run.

    Attributes:
        name: The image that was prepared last, as people call it; None before that.
    """

    def __init__(self, compute: KubernetesComputeSpec) -> None:
        self._compute = compute
        self._definition: ImageDefinition | None = None
        self.name: str | None = None

    def resolve(self, environment: EnvironmentSpec | None) -> ResolvedEnvironment:
        """Return the image by digest, or by its definition if it has to be built.

        Raises:
            EnvironmentBuildError: It has to be built and can't be, or nobody names an image.
        """
        if environment is not None and environment.needs_build:
            return self.define(environment).resolve()
        name = image_name(environment, self._compute)
        return resolve_image(name, self._find(name), environment)

    def recall(
        self, environment: EnvironmentSpec | None, description: Mapping[str, Any]
    ) -> ResolvedEnvironment | None:
        """Return the environment that a run was planned with; None if its digest was not known then."""
        name, digest = str(description.get("image")), description.get("digest")
        if digest is None:
            return None
        if environment is not None and environment.needs_build:
            self._definition = recall(
                environment, description, default=self._compute.image, find=_at_digest
            )
            return self._definition.resolve()
        return resolve_image(name, _at_digest(name, digest), environment)

    def prepare(
        self,
        environment: EnvironmentSpec | None,
        resolved: ResolvedEnvironment,
        *,
        emit: Emit,
        guard: BuildGuard | None,
    ) -> ResolvedEnvironment:
        """Return ``resolved`` with an image that nodes can pull: one to be built is in the registry now.

        Raises:
            EnvironmentBuildError: It can't be built, or not be pushed.
            ComputeUnavailableError: The registry, or the daemon that is to build it, does not answer.
        """
        if environment is None or not environment.needs_build:
            self.name = image_name(environment, self._compute)
            return resolved
        definition, reference = self._provide(self.define(environment), emit, guard)
        self.name = definition.name
        return definition.resolve(reference)

    def is_prepared(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment
    ) -> bool | None:
        """Return whether the registry has the image; None if it does not tell."""
        try:
            if environment is not None and environment.needs_build:
                return self._seek(self.define(environment)) is not None
            return self._ask(resolved.image or "") is not None
        except ComputeUnavailableError:
            return None

    def define(self, environment: EnvironmentSpec) -> ImageDefinition:
        """Return the image to be built for an environment, the same one for as long as this object lives.

        Raises:
            EnvironmentBuildError: It has no base, can't be built anywhere, or could be kept nowhere.
        """
        self._registry(environment)
        if self._definition is None or self._definition.environment != environment:
            self._definition = define(environment, default=self._compute.image, find=self._find)
        return self._definition

    # ---- building --------------------------------------------------------------------------

    def _provide(
        self, definition: ImageDefinition, emit: Emit, guard: BuildGuard | None
    ) -> tuple[ImageDefinition, str]:
        """Return the definition, with bases that are known now, and the image in the registry."""
        if definition.problem is not None:
            definition = self._settle_bases(definition, emit)
        found = self._seek(definition)
        if found is None:
            where = self._registry(definition.environment).url
            with building_alone(definition, where=where, guard=guard, emit=emit):
                found = self._seek(definition)
                if found is None:
                    if self._compute.buildkit_host is not None:
                        self._build_with_buildkit(definition, self._compute.buildkit_host, emit)
                    else:
                        self._build_with_docker(definition, emit)
                    found = self._seek(definition)
        if found is None:
            raise ComputeUnavailableError(
                f"{name_environment(definition.environment)} was built and pushed, but the registry does not have "
                f"it as {self._reference(definition)}: whoever cleans the registry up was quick."
            )
        return definition, found

    def _settle_bases(self, definition: ImageDefinition, emit: Emit) -> ImageDefinition:
        """Return the definition with bases that are known now, as a Docker daemon knows some that we don't."""
        from airflow_mlpipelines.compute.docker.environments import settle_bases

        if self._compute.buildkit_host is not None:
            raise ComputeUnavailableError(
                f"{name_environment(definition.environment)} can't be built, as it is not known on what: "
                f"{definition.problem}"
            )
        return settle_bases(definition, self._builder, self._connect(definition), emit)

    def _build_with_docker(self, definition: ImageDefinition, emit: Emit) -> None:
        from airflow_mlpipelines.compute.docker.environments import build_and_push

        client = self._connect(definition)
        self._check_platform(definition, client)
        build_and_push(definition, self._builder, client, emit)

    def _build_with_buildkit(self, definition: ImageDefinition, host: str, emit: Emit) -> None:
        from airflow_mlpipelines.compute.buildkit import BuildkitDaemon

        environment = definition.environment
        reference = self._reference(definition)
        daemon = BuildkitDaemon(
            compute=self._compute.name,
            host=host,
            tls=self._compute.buildkit_tls,
            logins=[read_login(conn_id) for conn_id in self._conn_ids],
            insecure=self._registry(environment).insecure,
        )
        emit(
            f"Building image {reference} for {name_environment(environment)} on {host}. This is done once."
        )
        began = time.monotonic()
        daemon.build(
            definition.context,
            reference=reference,
            platform=self._platform,
            labels={LABEL: definition.context.digest},
            named=name_environment(environment),
            emit=emit,
        )
        emit(f"Built and pushed image {reference} in {time.monotonic() - began:.1f} s")
        tell_unpinned(environment, emit)

    def _registry(self, environment: EnvironmentSpec) -> RegistrySpec:
        registry = self._compute.registry
        if registry is None:
            raise EnvironmentBuildError(
                f"{name_environment(environment)} has to be built for compute {self._compute.name!r}, whose nodes "
                "pull images from a registry, and none is named. Write `registry: {url: "
                "registry.example.com/team/env, conn_id: …}` into the workspace file, or build the image yourself "
                "and name it as image=."
            )
        return registry

    @property
    def _builder(self) -> DockerComputeSpec:
        """The daemon that builds, as a compute of its own."""
        compute = self._compute
        return DockerComputeSpec(
            name=compute.name,
            image=compute.image,
            docker_url=compute.docker_url,
            conn_id=compute.image_conn_id,
            registry=compute.registry,
        )

    def _connect(self, definition: ImageDefinition) -> APIClient:
        """Return a connection to the daemon that builds."""
        from airflow_mlpipelines.compute.docker.daemon import connect

        named = name_environment(definition.environment)
        try:
            return connect(self._builder)
        except ComputeUnavailableError as error:
            raise ComputeUnavailableError(
                f"{named} is not in the registry yet, and can't be built here: {error} Or build it where there is a "
                "daemon: `mlpipelines environment build`."
            ) from error
        except ImportError as error:
            raise EnvironmentBuildError(
                f"{named} is not in the registry yet, and can't be built here without the Docker provider: pip install "
                "'airflow-mlpipelines[docker]'. Or build it elsewhere: `mlpipelines environment build`."
            ) from error

    @property
    def _platform(self) -> str:
        return self._compute.node_selector.get(_PLATFORM_LABEL, USUAL_PLATFORM)

    def _check_platform(self, definition: ImageDefinition, client: APIClient) -> None:
        from airflow_mlpipelines.compute.docker.environments import daemon_platform

        found = daemon_platform(client)
        if found != self._platform:
            raise EnvironmentBuildError(
                f"{name_environment(definition.environment)} would be built for {found}, the processors of the Docker "
                f"daemon, but compute {self._compute.name!r} runs on {self._platform}. Name a daemon of those with "
                f"docker_url=, or nodes of these with node_selector={{{_PLATFORM_LABEL}: {found}}}."
            )

    # ---- the registry ----------------------------------------------------------------------

    def _find(self, name: str) -> ImageIdentity:
        return look_up_image(name, conn_ids=self._conn_ids, insecure=self._insecure)

    def _ask(self, name: str) -> str | None:
        return find_digest(name, conn_ids=self._conn_ids, insecure=self._insecure)

    def _seek(self, definition: ImageDefinition) -> str | None:
        """Return the image in the registry by digest, or None if the registry has none."""
        name = self._reference(definition)
        digest = self._ask(name)
        return _at_digest(name, digest).reference if digest is not None else None

    def _reference(self, definition: ImageDefinition) -> str:
        registry = self._registry(definition.environment)
        return f"{registry.url}:{definition.tag(self._platform)}"

    @property
    def _conn_ids(self) -> list[str]:
        return image_conn_ids(self._compute)

    @property
    def _insecure(self) -> set[str]:
        registry = self._compute.registry
        if registry is None or not registry.insecure:
            return set()
        return {ImageName.parse(registry.url).registry}


def _at_digest(name: str, digest: str) -> ImageIdentity:
    """Return the image that ``name`` stood for when its digest was taken."""
    return ImageIdentity(f"{repository_of(name)}@{digest}", digest)
