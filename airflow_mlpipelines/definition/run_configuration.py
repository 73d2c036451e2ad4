"""Run configurations: where and on what a script runs, kept in a file for many pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.definition.azure_files import (
    RUN_CONFIGURATION_KEYS,
    check_keys,
    drop_empty,
    get_section,
    read_mapping,
    report_unsupported,
    write_yaml,
)
from airflow_mlpipelines.definition.distributed import Distribution, Mpi, PyTorch, TensorFlow
from airflow_mlpipelines.definition.environment import Environment
from airflow_mlpipelines.definition.environment_files import (
    SDK_SHM_SIZE,
    environment_from_fields,
    environment_to_fields,
)
from airflow_mlpipelines.definition.resources import Resources
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DIRECTORY = ".azureml"
EXTENSION = ".runconfig"
_DIRECTORIES = (DIRECTORY, "aml_config", "")
_ENVIRONMENT_FILE = "environment.yml"
_FRAMEWORKS = ("Python", "PyTorch", "TensorFlow")
_COMMUNICATORS = ("None", "Mpi", "OpenMpi", "IntelMpi", "Nccl", "Gloo", "ParameterServer")
_MPI = ("Mpi", "OpenMpi", "IntelMpi")
_GIBIBYTE = 1 << 30


class RunConfiguration:
    """Where and on what a script runs: what a step's ``runconfig=`` takes.

    What a step says itself counts more. A step takes the target, environment, variables, resources,
    distribution and timeout; ``script``, ``arguments`` and ``command`` are kept for who reads them.

    Args:
        script: The script.
        arguments: Its arguments.
        target: The name of a compute.
        environment: The software it runs on.
        environment_variables: Set for the process.
        distributed: How it is started as several processes.
        resources: What it may use of its compute.
        timeout: Seconds after which it is killed.
        command: A program in place of a script, as text or as a list.

    Attributes:
        unsupported: The keys of the file it was loaded from that mean nothing here.
    """

    def __init__(  # noqa: PLR0913 - one argument for each thing that there can be
        self,
        script: str | None = None,
        arguments: Sequence[str] | None = None,
        *,
        target: str | None = None,
        environment: Environment | None = None,
        environment_variables: Mapping[str, str] | None = None,
        distributed: Distribution | None = None,
        resources: Resources | None = None,
        timeout: int | None = None,
        command: str | Sequence[str] | None = None,
    ) -> None:
        self.script = script
        self.arguments = list(arguments or ())
        self.target = target
        self.environment = environment
        self.environment_variables = dict(environment_variables or {})
        self.distributed = distributed
        self.resources = resources
        self.timeout = timeout
        self.command = command
        self.unsupported: tuple[str, ...] = ()

    def save(
        self,
        path: str | Path | None = None,
        name: str | None = None,
        separate_environment_yaml: bool = False,
    ) -> Path:
        """Write the configuration into a file, and return which.

        Args:
            path: The project's directory, where it becomes ``.azureml/<name>.runconfig``; by default the
                current one. Or a file.
            name: Its name; a directory needs one.
            separate_environment_yaml: Whether the environment becomes ``environment.yml`` beside it.

        Raises:
            DefinitionError: A directory is given, and no name.
        """
        base = Path.cwd() if path is None else Path(path)
        file = base
        if base.is_dir():
            if not name:
                raise DefinitionError(
                    f"RunConfiguration.save: {base} is a directory, so it needs a name"
                )
            file = base / DIRECTORY / f"{name.removesuffix(EXTENSION)}{EXTENSION}"
            file.parent.mkdir(exist_ok=True)
        fields = self.to_dict()
        if separate_environment_yaml and "environment" in fields:
            write_yaml(file.parent / _ENVIRONMENT_FILE, fields["environment"])
            beside = file.parent / _ENVIRONMENT_FILE
            fields["environment"] = beside.relative_to(
                base if base.is_dir() else file.parent
            ).as_posix()
        write_yaml(file, fields)
        return file

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> RunConfiguration:
        """Return the configuration of a file that this package or Azure ML's SDK v1 has written.

        What the SDK knows and means nothing here is left out with a warning that names it.

        Args:
            path: The project's directory, or a file.
            name: Its name, where a directory is given.

        Raises:
            DefinitionError: It is not there, or something in it is wrong.
        """
        base = Path(path)
        file = _find(base, name) if base.is_dir() else base
        where = str(file)
        fields = read_mapping(file)
        directories = (base if base.is_dir() else file.parent, file.parent, file.parent.parent)
        if isinstance(fields.get("environment"), str):
            beside = [directory / fields["environment"] for directory in directories]
            fields["environment"] = read_mapping(
                next((one for one in beside if one.is_file()), beside[0])
            )
        made = cls._from_fields(where, fields, directories)
        report_unsupported(where, made.unsupported)
        return made

    @staticmethod
    def delete(path: str | Path, name: str) -> None:
        """Remove a configuration of a project's directory.

        Raises:
            DefinitionError: There is none of this name.
        """
        _find(Path(path), name).unlink()

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as it stands in a file; what says nothing is left out."""
        spec = self.resources.spec if self.resources is not None else None
        memory = spec.memory / _GIBIBYTE if spec is not None and spec.memory is not None else None
        resources = {
            "gpuCount": spec.gpus if spec is not None else None,
            "gpuType": spec.gpu_type if spec is not None else None,
            "cpuCount": spec.cpus if spec is not None else None,
            "memoryRequestInGB": memory,
        }
        return drop_empty(
            {
                "script": self.script,
                "arguments": [str(argument) for argument in self.arguments],
                "command": self.command
                if isinstance(self.command, str | None)
                else [*self.command],
                "target": self.target,
                "maxRunDurationSeconds": self.timeout,
                **_distributed_to_fields(self.distributed),
                "environment": (
                    environment_to_fields(self.environment.spec)
                    if self.environment is not None
                    else None
                ),
                "environmentVariables": self.environment_variables,
                "docker": drop_empty({"shmSize": spec.shm_size if spec is not None else None}),
                "resourceConfiguration": drop_empty(resources),
            }
        )

    @classmethod
    def _from_fields(
        cls, where: str, fields: Mapping[str, Any], directories: tuple[Path, ...]
    ) -> RunConfiguration:
        unsupported = check_keys(where, fields, RUN_CONFIGURATION_KEYS)
        environment = None
        shm_size = None
        if fields.get("environment"):
            if not isinstance(fields["environment"], dict):
                raise DefinitionError(f"{where}: environment: names with values are wanted here")
            spec, missing = environment_from_fields(
                f"{where}: environment", fields["environment"], *directories
            )
            unsupported += [f"environment.{key}" for key in missing]
            environment = Environment.from_spec(spec)
            shm_size = get_section(fields["environment"], "docker").get("shmSize")
        own = get_section(fields, "docker").get("shmSize")
        sizes = [size for size in (own, shm_size) if size and size != SDK_SHM_SIZE]
        wanted = get_section(fields, "resourceConfiguration")
        memory = wanted.get("memoryRequestInGB")
        resources = drop_empty(
            {
                "gpus": wanted.get("gpuCount"),
                "gpu_type": wanted.get("gpuType"),
                "cpus": wanted.get("cpuCount"),
                "memory": round(memory * _GIBIBYTE) if memory else None,
                "shm_size": sizes[0] if sizes else None,
            }
        )
        made = cls(
            fields.get("script"),
            fields.get("arguments"),
            target=fields.get("target"),
            environment=environment,
            environment_variables={
                key: str(value)
                for key, value in get_section(fields, "environmentVariables").items()
            },
            distributed=_distributed_from_fields(where, fields),
            resources=Resources(**resources) if resources else None,
            timeout=fields.get("maxRunDurationSeconds"),
            command=fields.get("command") or None,
        )
        made.unsupported = tuple(unsupported)
        return made

    def __repr__(self) -> str:
        return f"RunConfiguration({self.script!r}, target={self.target!r})"


def _find(project: Path, name: str | None) -> Path:
    """Return the file of a configuration: the SDK's releases have put it into several places."""
    if not name:
        raise DefinitionError(f"RunConfiguration: {project} is a directory, so a name is needed")
    names = (f"{name.removesuffix(EXTENSION)}{EXTENSION}", name)
    for directory in _DIRECTORIES:
        for candidate in names:
            file = project / directory / candidate
            if file.is_file():
                return file
    there = [
        file.name.removesuffix(EXTENSION)
        for directory in _DIRECTORIES
        for file in sorted((project / directory).glob(f"*{EXTENSION}"))
    ]
    raise DefinitionError(
        f"run configuration {name!r} is not in {project / DIRECTORY}, which has {list_options(there)}."
        f"{suggest(name, there)}"
    )


def _distributed_to_fields(distributed: Distribution | None) -> dict[str, Any]:
    if distributed is None:
        return {}
    spec = distributed.spec
    if isinstance(distributed, Mpi):
        return {
            "framework": "Python",
            "communicator": "Mpi",
            "nodeCount": spec.nodes,
            "mpi": {"processCountPerNode": spec.processes_per_node},
        }
    if isinstance(distributed, PyTorch):
        return {
            "framework": "PyTorch",
            "communicator": "Nccl",
            "nodeCount": spec.nodes,
            "pytorch": {"processCount": spec.nodes * spec.processes_per_node},
        }
    if spec.chief:
        raise DefinitionError(
            "TensorFlow(chief=True) can't be saved: a run configuration of Azure ML has no place for it. Give it "
            "to the step as distributed="
        )
    return {
        "framework": "TensorFlow",
        "communicator": "ParameterServer",
        "nodeCount": spec.nodes,
        "tensorflow": {
            "workerCount": spec.nodes * spec.processes_per_node,
            "parameterServerCount": spec.parameter_servers,
        },
    }


def _distributed_from_fields(where: str, fields: Mapping[str, Any]) -> Distribution | None:
    framework = fields.get("framework") or "Python"
    communicator = fields.get("communicator") or "None"
    for key, value, known in (
        ("framework", framework, _FRAMEWORKS),
        ("communicator", communicator, _COMMUNICATORS),
    ):
        if value not in known:
            raise DefinitionError(
                f"{where}: {key} is {value!r}; it can be {list_options(known)}.{suggest(str(value), known)}"
            )
    nodes = fields.get("nodeCount") or 1
    if communicator in _MPI:
        processes = get_section(fields, "mpi").get("processCountPerNode") or 1
        return Mpi(nodes=nodes, processes_per_node=processes)
    if framework == "PyTorch" and communicator != "None":
        processes = get_section(fields, "pytorch").get("processCount") or nodes
        if processes % nodes:
            raise DefinitionError(
                f"{where}: pytorch.processCount is {processes}, which does not go evenly into nodeCount {nodes}"
            )
        return PyTorch(nodes=nodes, processes_per_node=processes // nodes)
    if framework == "TensorFlow" and communicator == "ParameterServer":
        counts = get_section(fields, "tensorflow")
        workers = counts.get("workerCount") or 1
        if workers % nodes:
            raise DefinitionError(
                f"{where}: tensorflow.workerCount is {workers}, which does not go evenly into nodeCount {nodes}"
            )
        return TensorFlow(
            workers=workers,
            parameter_servers=counts.get("parameterServerCount") or 0,
            nodes=nodes,
        )
    if nodes != 1:
        raise DefinitionError(
            f"{where}: nodeCount is {nodes}, and communicator is {communicator!r}: nobody would tell the nodes of "
            "each other. Name a communicator, such as 'OpenMpi' or 'Nccl'."
        )
    return None
