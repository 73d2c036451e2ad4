"""From an environment to a build context: the Dockerfile that puts its packages on its base image."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.compute.base import name_environment
from airflow_mlpipelines.compute.build_context import BuildContext, ContextFile
from airflow_mlpipelines.compute.dockerfiles import find_bases, pin_bases
from airflow_mlpipelines.compute.local_packages import collect_requirements
from airflow_mlpipelines.exceptions import EnvironmentBuildError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.definition.graph import EnvironmentSpec

RECIPE_VERSION = 1
"""Raised when the same definition is built in another way: every image is another one then."""
MARK = "mlpipelines:"
"""Begins what our own instructions print when they can't go on."""
_BASE = "base image"
_DIRECTORY = "/opt/mlpipelines/environment"
_VERSION = re.compile(r"^\d+(\.\d+){1,2}$")
_PINNED = re.compile(r"===?\s*[^*\s]+(\s|;|$)|\s@\s|^(/|-)")
_NAME = re.compile(r"^([A-Za-z0-9][\w.-]*(?:\[[^\]]*\])?)\s*(.*)$")
_PIP = "PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1"


@dataclass(frozen=True)
class BaseImage:
    """An image to build upon, as it is now.

    Attributes:
        reference: What stands behind FROM.
        digest: ``sha256:…``, or None if it is not known.
    """

    reference: str
    digest: str | None


def base_names(environment: EnvironmentSpec, *, default: str | None) -> list[str]:
    """Return the names of the images that an environment's image is built upon.

    Args:
        environment: One that needs a build.
        default: The image of a compute, for environments that name none. Without one it is the official
            image of the Python version asked for.

    Raises:
        EnvironmentBuildError: Nobody names one.
    """
    if environment.dockerfile is not None:
        names = find_bases(environment.dockerfile)
        if not names and not re.search(r"^\s*FROM\s", environment.dockerfile, re.I | re.M):
            raise EnvironmentBuildError(
                f"{name_environment(environment)}: its Dockerfile has no FROM, and so no base."
            )
        return names
    name = environment.image or default
    if name is None and environment.python_version is not None:
        name = f"python:{_check_version(environment)}-slim"
    if name is None:
        raise EnvironmentBuildError(
            f"{name_environment(environment)} has no base image. Give it an image= or a python_version=, or its "
            "compute an image of its own."
        )
    return [name]


def make_context(environment: EnvironmentSpec, bases: Mapping[str, BaseImage]) -> BuildContext:
    """Return what the environment's image is built from.

    Two definitions have the same digest exactly when bases (by digest), Dockerfile, packages in their order,
    the contents of local files and our recipe are the same. Neither the environment's name counts, nor its
    variables, which the process gets and not the image.

    Args:
        environment: One that needs a build.
        bases: What each of its :func:`base_names` stands for.

    Raises:
        EnvironmentBuildError: It can't be built anywhere: a local package is missing, for example.
    """
    lines, files = _recipe(environment)
    dockerfile = _render(environment, lines, {name: base.reference for name, base in bases.items()})
    counted = _render(
        environment, lines, {name: base.digest or name for name, base in bases.items()}
    )
    made_of = {
        "recipe": RECIPE_VERSION,
        "dockerfile": counted,
        "files": {name: file.digest for name, file in files.items()},
    }
    return BuildContext(dockerfile, files, digest("image-definition-v1", made_of)[:32])


def describe_packages(
    environment: EnvironmentSpec, bases: Mapping[str, BaseImage]
) -> dict[str, str]:
    """Return what an environment asks for, by name, so that a change of it can be told in words."""
    packages = {}
    for number, base in enumerate(bases.values(), 1):
        packages[_BASE + (f" {number}" if number > 1 else "")] = base.digest or "unknown"
    for line in environment.pip:
        match = _NAME.match(line)
        packages[match[1] if match else line] = (match[2] if match else "") or "any"
    for package in environment.apt:
        name, _, version = package.partition("=")
        packages[f"apt {name}"] = version or "any"
    if environment.conda is not None:
        packages["conda file"] = digest("conda-file-v1", environment.conda)[:12]
    return packages


def list_base_digests(packages: Mapping[str, str]) -> list[str]:
    """Return the digests of the bases among what :func:`describe_packages` has told, in their order."""
    found = {name: digest for name, digest in packages.items() if name.startswith(_BASE)}
    return [found[name] for name in sorted(found, key=lambda name: int(name[len(_BASE) :] or 1))]


def count_unpinned(environment: EnvironmentSpec) -> tuple[int, int]:
    """Return how many of its requirement lines name no exact version, and how many there are."""
    return sum(not _PINNED.search(line) for line in environment.pip), len(environment.pip)


def _render(environment: EnvironmentSpec, lines: list[str], bases: Mapping[str, str]) -> str:
    if environment.dockerfile is not None:
        head = pin_bases(environment.dockerfile, bases)
    else:
        head = "".join(f"FROM {reference}\n" for reference in bases.values())
    return head + "".join(f"{line}\n" for line in lines)


def _recipe(environment: EnvironmentSpec) -> tuple[list[str], dict[str, ContextFile]]:
    """Return the instructions after the base, and the files that they copy."""
    lines: list[str] = []
    files: dict[str, ContextFile] = {}
    if environment.apt:
        packages = " ".join(shlex.quote(package) for package in environment.apt)
        lines.append(
            "RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "
            f"{packages} && rm -rf /var/lib/apt/lists/*"
        )
    if environment.conda is not None:
        conda, local = _collect_conda(environment)
        files |= {f"conda/{name}": file for name, file in local.items()}
        # JSON is YAML too, and has one form.
        content = json.dumps(conda, indent=1)
        files["conda/environment.yaml"] = ContextFile(f"{content}\n".encode())
        file = f"{_DIRECTORY}/conda/environment.yaml"
        lines += [
            # Where activation would put it, which nobody does for a step's process.
            "ENV PATH=${MAMBA_ROOT_PREFIX:-/opt/conda}/bin:$PATH",
            f"COPY conda {_DIRECTORY}/conda",
            f"RUN if command -v micromamba; then micromamba install -y -n base -f {file}; "
            f"elif command -v mamba; then mamba env update -n base -f {file}; "
            f"elif command -v conda; then conda env update -n base -f {file}; "
            f"else echo '{MARK} the base image has neither conda nor mamba nor micromamba' >&2; exit 65; fi",
        ]
    if environment.python_version is not None:
        lines.append(_version_check(_check_version(environment)))
    if environment.pip:
        requirements, local = collect_requirements(
            name_environment(environment), environment.pip, directory=f"{_DIRECTORY}/pip"
        )
        text = "".join(f"{line}\n" for line in requirements)
        files["pip/requirements.txt"] = ContextFile(text.encode())
        files |= {f"pip/{name}": file for name, file in local.items()}
        lines += [
            f"COPY pip {_DIRECTORY}/pip",
            f"RUN {_PIP} python3 -m pip install -r {_DIRECTORY}/pip/requirements.txt",
        ]
    # A base may run as somebody who may install nothing; a step's process gets its user from the compute.
    return (["USER root", *lines] if lines else []), files


def _collect_conda(
    environment: EnvironmentSpec,
) -> tuple[Mapping[str, Any], dict[str, ContextFile]]:
    """Return the conda file as it is in the image, and the local files that its pip packages need there."""
    conda: Mapping[str, Any] = environment.conda or {}
    files: dict[str, ContextFile] = {}
    dependencies = []
    for number, item in enumerate(conda.get("dependencies") or ()):
        pip = item.get("pip") if isinstance(item, dict) else None
        if isinstance(pip, (list, tuple)):
            lines, local = collect_requirements(
                name_environment(environment),
                [str(line) for line in pip],
                directory=f"{_DIRECTORY}/conda/{number}",
            )
            files |= {f"{number}/{name}": file for name, file in local.items()}
            dependencies.append({**item, "pip": lines})
        else:
            dependencies.append(item)
    return ({**conda, "dependencies": dependencies} if files else conda), files


def _check_version(environment: EnvironmentSpec) -> str:
    version = environment.python_version or ""
    if not _VERSION.match(version):
        raise EnvironmentBuildError(
            f"{name_environment(environment)}: python_version is {version!r}; for an image, write a version "
            "such as '3.12' or '3.12.4'."
        )
    return version


def _version_check(version: str) -> str:
    program = (
        f"import sys; found = '.'.join(map(str, sys.version_info[:3])); "
        f"(found + '.').startswith('{version}.') or "
        f"sys.exit('{MARK} the base image has Python ' + found + ', and {version} is asked for')"
    )
    return f'RUN python3 -c "{program}"'
