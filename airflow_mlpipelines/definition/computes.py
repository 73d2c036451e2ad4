"""Compute targets: where steps run. Launching is another matter (:mod:`airflow_mlpipelines.compute`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.definition.graph import (
    ComputeSpec,
    DockerComputeSpec,
    KubernetesComputeSpec,
    LocalComputeSpec,
    RegistrySpec,
)
from airflow_mlpipelines.definition.resources import parse_gpus, parse_size
from airflow_mlpipelines.definition.shared_volumes import parse_shared_volumes
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SIZES = ("memory", "shm_size", "ephemeral_storage")
_REPOSITORY = re.compile(
    r"^(localhost|[\w-]+(\.[\w-]+)+|[\w-]+(?=:\d))(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+$"
)
_WITH_GPU_IDS = ("local", "docker")
_ADAPTER: TypeAdapter[ComputeSpec] = TypeAdapter(ComputeSpec)
_SPECS: dict[str, type[Any]] = {
    "local": LocalComputeSpec,
    "docker": DockerComputeSpec,
    "kubernetes": KubernetesComputeSpec,
}


class ComputeTarget:
    """A named place where steps run. Make one of its subclasses, or name one of the workspace's."""

    type: str = ""

    def __init__(self, name: str, **fields: Any) -> None:
        self.spec = make_compute_spec(name, {"type": self.type, **fields})

    @property
    def name(self) -> str:
        """Its name in the workspace."""
        return self.spec.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class LocalCompute(ComputeTarget):
    """Processes on the machine of the Airflow worker.

    Args:
        name: Its name.
        max_nodes: How many steps may run on it at once, over all pipelines. Airflow sees to it with the
            pool ``mlpipelines_<name>``, which has to be there: ``airflow pools set mlpipelines_<name> 4 ""``.
        gpus: The GPUs that steps may ask for, no two steps the same one: a list of ids (``GPU-…``, or
            numbers as ``nvidia-smi`` gives them), or how many of the machine's. None is all that the
            machine has. With a list or a number, a step that asks for none sees none.

    Raises:
        DefinitionError: ``gpus`` is neither a number nor ids.
    """

    type = "local"

    def __init__(
        self,
        name: str = "local",
        *,
        max_nodes: int | None = None,
        gpus: int | Sequence[int | str] | None = None,
    ) -> None:
        super().__init__(name, max_nodes=max_nodes, gpus=gpus)


class DockerCompute(ComputeTarget):
    """Containers of a Docker daemon.

    Args:
        name: Its name.
        fields: As :class:`~airflow_mlpipelines.definition.graph.DockerComputeSpec` has them: ``image``,
            ``docker_url``, ``conn_id``, ``cpus``, ``memory``, ``gpus``, ``shm_size``, ``user``,
            ``network_mode``, ``extra_hosts``, ``registry``, ``max_nodes``. Sizes are bytes, or such as ``8G``.
            GPUs are a number, or a list of ids.

    Raises:
        DefinitionError: A field is unknown or of the wrong type.
    """

    type = "docker"


class KubernetesCompute(ComputeTarget):
    """Pods of a Kubernetes cluster.

    Args:
        name: Its name.
        fields: As :class:`~airflow_mlpipelines.definition.graph.KubernetesComputeSpec` has them:
            ``namespace``, ``image``, ``gpus``, ``gpu_resource``, ``gpu_type_label``, ``node_selector``, ``agent_image``,
            ``shared_volumes``, ``deferrable`` and so on. ``max_nodes`` is how many pods there may be at once, over all
            pipelines: a step on several nodes takes as many. Airflow sees to it with a pool that has to be there, and to
            count deferred tasks: ``airflow pools set --include-deferred mlpipelines_<name> 4 ""``.

    Raises:
        DefinitionError: A field is unknown or of the wrong type.
    """

    type = "kubernetes"


_TARGETS: dict[str, type[ComputeTarget]] = {
    "local": LocalCompute,
    "docker": DockerCompute,
    "kubernetes": KubernetesCompute,
}


def make_compute_spec(name: str, fields: Mapping[str, Any]) -> ComputeSpec:
    """Return the checked form of a compute's definition.

    Raises:
        DefinitionError: The type or a field is unknown, or a value is of the wrong type.
    """
    where = f"compute {name!r}"
    kind = fields.get("type")
    if kind not in _SPECS:
        raise DefinitionError(
            f"{where}: type is {kind!r}; it can be {list_options(_SPECS)}.{suggest(str(kind), _SPECS)}"
        )
    known = _SPECS[kind].model_fields.keys() - {"name"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise DefinitionError(
            f"{where}: there is no field {unknown[0]!r} of a {kind} compute, which has "
            f"{list_options(known)}.{suggest(unknown[0], known)}"
        )
    values = dict(fields)
    if values.get("registry") is not None:
        values["registry"] = make_registry(f"{where}: registry", values["registry"])
    for size in _SIZES:
        if size in values:
            values[size] = parse_size(f"{where}: {size}", values[size])
    if "shared_volumes" in values:
        values["shared_volumes"] = parse_shared_volumes(
            f"{where}: shared_volumes", values["shared_volumes"]
        )
    if kind in _WITH_GPU_IDS:
        values["gpus"] = parse_gpus(f"{where}: gpus", values.get("gpus"))
    try:
        return _ADAPTER.validate_python({**values, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        raise DefinitionError(f"{where}: {field}: {first['msg']}") from error


def make_registry(where: str, fields: Any) -> RegistrySpec:
    """Return the checked form of a registry's definition.

    Raises:
        DefinitionError: Its url is missing or no registry with a repository, or a field is unknown.
    """
    if isinstance(fields, RegistrySpec):
        return fields
    if not isinstance(fields, dict) or not isinstance(fields.get("url"), str):
        raise DefinitionError(
            f"{where}: it needs a url, such as {{url: registry.example.com/team/env, conn_id: my_docker}}"
        )
    unknown = sorted(set(fields) - RegistrySpec.model_fields.keys())
    if unknown:
        known = RegistrySpec.model_fields
        raise DefinitionError(
            f"{where}: there is no field {unknown[0]!r} of a registry, which has {list_options(known)}."
            f"{suggest(unknown[0], known)}"
        )
    if "@" in fields["url"]:  # not shown: it may be a password
        raise DefinitionError(
            f"{where}: url has an @ in it. Write registry and repository without a user, a password or a digest, and "
            "name an Airflow connection of type docker as conn_id"
        )
    url = re.sub(r"^https?://", "", fields["url"]).rstrip("/")
    if not _REPOSITORY.match(url):
        raise DefinitionError(
            f"{where}: url is {fields['url']!r}; write registry and repository without a tag, such as "
            "'registry.example.com/team/env'"
        )
    conn_id = fields.get("conn_id")
    if conn_id is not None and not isinstance(conn_id, str):
        raise DefinitionError(f"{where}: conn_id is to be the name of an Airflow connection")
    insecure = fields.get("insecure", False)
    if not isinstance(insecure, bool):
        raise DefinitionError(f"{where}: insecure is to be true or false, not {insecure!r}")
    return RegistrySpec(url=url, conn_id=conn_id, insecure=insecure)


def wrap_compute_spec(spec: ComputeSpec) -> ComputeTarget:
    """Return the authoring object of a compute's definition."""
    target = object.__new__(_TARGETS[spec.type])
    target.spec = spec
    return target
