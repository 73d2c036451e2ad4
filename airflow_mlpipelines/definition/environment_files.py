"""Environments in files, in the layout of Azure ML's SDK v1, with keys of ours for what it lacks.

A directory as ``Environment.save_to_directory`` makes it::

    azureml_environment.json     the environment
    conda_dependencies.yml       its conda file, if it has one
    BaseDockerfile               its Dockerfile, if it has one

Ours are ``python.version``, ``python.pip`` and ``docker.aptPackages``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.definition.azure_files import (
    ENVIRONMENT_KEYS,
    check_keys,
    drop_empty,
    get_section,
    read_mapping,
    write_yaml,
)
from airflow_mlpipelines.definition.graph import EnvironmentSpec
from airflow_mlpipelines.definition.url_secrets import check_environment
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ENVIRONMENT_FILE = "azureml_environment.json"
CONDA_FILE = "conda_dependencies.yml"
DOCKERFILE = "BaseDockerfile"
SDK_SHM_SIZE = "2g"
"""What the SDK writes where nobody asked for a size."""
_SDK_VARIABLES = {"EXAMPLE_ENV_VAR": "EXAMPLE_VALUE"}


def environment_to_fields(spec: EnvironmentSpec) -> dict[str, Any]:
    """Return an environment as it stands in a file; what says nothing is left out."""
    python = {
        "userManagedDependencies": spec.conda is None,
        "condaDependencies": spec.conda,
        "version": spec.python_version,
        "pip": list(spec.pip),
    }
    docker = {
        "baseImage": spec.image,
        "baseDockerfile": spec.dockerfile,
        "aptPackages": list(spec.apt),
    }
    return drop_empty(
        {
            "name": spec.name,
            "environmentVariables": dict(spec.environment_variables),
            "python": drop_empty(python),
            "docker": drop_empty(docker),
        }
    )


def environment_from_fields(
    where: str, fields: Mapping[str, Any], *directories: Path
) -> tuple[EnvironmentSpec, list[str]]:
    """Return an environment from a file's fields, and the keys that mean nothing here.

    Azure ML's conda dependencies are a conda file, unless the environment manages its packages itself; its
    base image is an image, from its registry if that has an address.

    Args:
        where: The file, for messages.
        fields: What stands in it.
        directories: Where a conda file that they name may lie.

    Raises:
        DefinitionError: A key or a value is wrong, the conda file is not there, or a URL among the packages
            has a password or a token in it.
    """
    unsupported = check_keys(where, fields, ENVIRONMENT_KEYS)
    python, docker = get_section(fields, "python"), get_section(fields, "docker")
    variables = get_section(fields, "environmentVariables")
    if not isinstance(variables, dict):
        raise DefinitionError(f"{where}: environmentVariables: names with values are wanted")
    conda = None
    if not python.get("userManagedDependencies"):
        conda = _find_conda(where, python, directories)
    image, dockerfile = docker.get("baseImage"), docker.get("baseDockerfile")
    if image and dockerfile:
        raise DefinitionError(
            f"{where}: docker has a baseImage and a baseDockerfile: leave one of them out; a Dockerfile names its "
            "base itself."
        )
    address = get_section(docker, "baseImageRegistry").get("address")
    values = {
        "name": fields.get("name"),
        "image": f"{address}/{image}" if image and address else image,
        "dockerfile": dockerfile,
        "python_version": python.get("version"),
        "pip": tuple(python.get("pip") or ()),
        "conda": conda,
        "apt": tuple(docker.get("aptPackages") or ()),
        "environment_variables": {
            name: str(value) for name, value in variables.items() if variables != _SDK_VARIABLES
        },
    }
    from pydantic import ValidationError

    try:
        spec = EnvironmentSpec.model_validate(drop_empty(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DefinitionError(f"{where}: {place}: {first['msg']}") from error
    check_environment(where, spec)
    return spec, unsupported


def write_environment(spec: EnvironmentSpec, directory: Path, *, overwrite: bool) -> None:
    """Write an environment into a directory, which is made if it is not there.

    Raises:
        DefinitionError: There is one already, and it may not be overwritten.
    """
    file = directory / ENVIRONMENT_FILE
    if file.exists() and not overwrite:
        raise DefinitionError(f"{file} is there already; pass overwrite=True to replace it")
    fields = environment_to_fields(spec)
    conda = get_section(fields, "python").pop("condaDependencies", None)
    dockerfile = get_section(fields, "docker").pop("baseDockerfile", None)
    directory.mkdir(parents=True, exist_ok=True)
    for name in (CONDA_FILE, DOCKERFILE):
        (directory / name).unlink(missing_ok=True)
    if conda is not None:
        write_yaml(directory / CONDA_FILE, conda)
    if dockerfile is not None:
        (directory / DOCKERFILE).write_text(dockerfile, encoding="utf-8")
    file.write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")


def read_environment(directory: Path) -> tuple[EnvironmentSpec, list[str]]:
    """Return the environment that was written into a directory, and the keys that mean nothing here.

    Raises:
        DefinitionError: There is none, or something in it is wrong.
    """
    file = directory / ENVIRONMENT_FILE
    fields = read_mapping(file)
    dockerfile = directory / DOCKERFILE
    if dockerfile.is_file():
        docker = {**get_section(fields, "docker"), "baseDockerfile": dockerfile.read_text("utf-8")}
        fields = {**fields, "docker": docker}
    python = get_section(fields, "python")
    if not python.get("condaDependencies") and (directory / CONDA_FILE).is_file():
        fields = {**fields, "python": {"condaDependenciesFile": CONDA_FILE} | drop_empty(python)}
    return environment_from_fields(str(file), fields, directory)


def _find_conda(
    where: str, python: Mapping[str, Any], directories: tuple[Path, ...]
) -> dict[str, Any] | None:
    conda = python.get("condaDependencies")
    name = python.get("condaDependenciesFile")
    if not conda and name:
        found = [directory / name for directory in directories if (directory / name).is_file()]
        if not found:
            raise DefinitionError(
                f"{where}: python.condaDependenciesFile: {name!r} is not there. It is looked for in "
                f"{', '.join(str(directory) for directory in directories)}."
            )
        conda = read_mapping(found[0])
    if conda and (not isinstance(conda, dict) or "dependencies" not in conda):
        raise DefinitionError(f"{where}: python: a conda file without 'dependencies' is none")
    return conda or None
