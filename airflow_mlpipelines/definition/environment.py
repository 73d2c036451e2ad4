"""Environments: the software that a step runs on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.definition.graph import EnvironmentSpec
from airflow_mlpipelines.definition.url_secrets import check_environment
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FROM = re.compile(r"^\s*FROM\s", re.I | re.M)
_APT_PACKAGE = re.compile(r"^[a-z0-9][a-z0-9+.-]*(:[a-z0-9]+)?(=[A-Za-z0-9.+~:*-]+|/[\w.-]+)?$")


class Environment:
    """An image, or packages, or both.

    Args:
        name: A name for people; it does not count in the digest.
        image: A container image. Its digest counts, not its tag.
        dockerfile: The text of a Dockerfile, or a :class:`~pathlib.Path` to one.
        python_version: Such as ``3.12``.
        pip: Requirement lines, in pip's own form.
        conda: The content of a conda environment file, or a :class:`~pathlib.Path` to one.
        apt: Packages of the image's distribution (Debian, Ubuntu), such as ``libgomp1``.
        environment_variables: Set for the step's process.

    Raises:
        DefinitionError: A file is not there, an image and a Dockerfile are both given, or a URL among the
            packages has a password or a token in it.
    """

    def __init__(  # noqa: PLR0913 - one argument for each thing that there can be
        self,
        name: str | None = None,
        *,
        image: str | None = None,
        dockerfile: str | Path | None = None,
        python_version: str | None = None,
        pip: Sequence[str] = (),
        conda: Mapping[str, Any] | Path | None = None,
        apt: Sequence[str] = (),
        environment_variables: Mapping[str, str] | None = None,
    ) -> None:
        where = _name(name)
        if image is not None and dockerfile is not None:
            raise DefinitionError(
                f"{where}: give an image or a Dockerfile, not both; a Dockerfile names its base itself."
            )
        if isinstance(pip, str):
            raise DefinitionError(f"{where}: pip takes a list of requirement lines, not one text")
        _check_apt(where, apt)
        if isinstance(dockerfile, Path):
            dockerfile = _read(where, dockerfile)
        if isinstance(conda, Path):
            conda = _read_yaml(where, conda)
        self.spec = EnvironmentSpec(
            name=name,
            image=image,
            dockerfile=dockerfile,
            python_version=python_version,
            pip=tuple(pip),
            conda=dict(conda) if conda is not None else None,
            apt=tuple(apt),
            environment_variables=dict(environment_variables or {}),
        )
        check_environment(where, self.spec)

    @classmethod
    def from_spec(cls, spec: EnvironmentSpec) -> Environment:
        """Return the authoring object of an environment's definition.

        Raises:
            DefinitionError: A URL among its packages has a password or a token in it.
        """
        check_environment(_name(spec.name), spec)
        made = object.__new__(cls)
        made.spec = spec
        return made

    @classmethod
    def from_pip_requirements(cls, name: str, file_path: str | Path) -> Environment:
        """Return an environment of the requirements in a file; empty lines and comments are left out.

        Raises:
            DefinitionError: The file is not there.
        """
        return cls(name, pip=_read_requirements(f"environment {name!r}", Path(file_path)))

    @classmethod
    def from_conda_specification(cls, name: str, file_path: str | Path) -> Environment:
        """Return an environment of a conda file.

        Raises:
            DefinitionError: The file is not there or is no conda file.
        """
        return cls(name, conda=Path(file_path))

    @classmethod
    def from_docker_image(
        cls,
        name: str,
        image: str,
        *,
        conda_specification: str | Path | None = None,
        pip_requirements: str | Path | None = None,
    ) -> Environment:
        """Return an environment that is an image, with the packages of a conda or a requirements file on it.

        Raises:
            DefinitionError: A file is not there, or both are given.
        """
        packages = _read_packages(name, conda_specification, pip_requirements)
        return cls(name, image=image, **packages)

    @classmethod
    def from_dockerfile(
        cls,
        name: str,
        dockerfile: str | Path,
        *,
        conda_specification: str | Path | None = None,
        pip_requirements: str | Path | None = None,
    ) -> Environment:
        """Return an environment whose image is built from a Dockerfile.

        Args:
            name: Its name.
            dockerfile: The text, or the file: a Path, or text of one line that names one.
            conda_specification: A conda file whose packages are put on it.
            pip_requirements: A requirements file whose packages are put on it.

        Raises:
            DefinitionError: A file is not there, or packages are given in both ways.
        """
        if isinstance(dockerfile, str) and not _FROM.search(dockerfile):
            dockerfile = Path(dockerfile)
        packages = _read_packages(name, conda_specification, pip_requirements)
        return cls(name, dockerfile=dockerfile, **packages)

    @classmethod
    def load_from_directory(cls, path: str | Path) -> Environment:
        """Return the environment of a directory that this package or Azure ML's SDK v1 has written.

        What the SDK knows and means nothing here is left out with a warning that names it.

        Raises:
            DefinitionError: There is none, or something in it is wrong.
        """
        from airflow_mlpipelines.definition.azure_files import report_unsupported
        from airflow_mlpipelines.definition.environment_files import read_environment

        spec, unsupported = read_environment(Path(path))
        report_unsupported(str(path), unsupported)
        return cls.from_spec(spec)

    def save_to_directory(
        self,
        path: str | Path,
        overwrite: bool = False,
    ) -> None:
        """Write the environment into a directory, which is made if it is not there.

        Raises:
            DefinitionError: It has an environment already, and may not be overwritten.
        """
        from airflow_mlpipelines.definition.environment_files import write_environment

        write_environment(self.spec, Path(path), overwrite=overwrite)

    @property
    def name(self) -> str | None:
        """The name for people."""
        return self.spec.name

    @property
    def digest(self) -> str:
        """64 hex digits over all but the name."""
        # A field that came later counts only where it is used, so that the others keep their digests.
        left_out = {"name"} if self.spec.apt else {"name", "apt"}
        return digest("environment-spec-v1", self.spec.model_dump(mode="json", exclude=left_out))

    def __repr__(self) -> str:
        return f"Environment({self.name!r})"


def _name(name: str | None) -> str:
    return f"environment {name!r}" if name else "environment"


def _read_packages(
    name: str, conda_specification: str | Path | None, pip_requirements: str | Path | None
) -> dict[str, Any]:
    """Return the arguments for the packages of a conda or a requirements file."""
    where = f"environment {name!r}"
    if conda_specification is not None and pip_requirements is not None:
        raise DefinitionError(
            f"{where}: give a conda_specification or pip_requirements, not both; a conda file can have pip packages."
        )
    if conda_specification is not None:
        return {"conda": Path(conda_specification)}
    if pip_requirements is not None:
        return {"pip": _read_requirements(where, Path(pip_requirements))}
    return {}


def _read_requirements(where: str, path: Path) -> list[str]:
    lines = [line.split(" #")[0].strip() for line in _read(where, path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _check_apt(where: str, packages: Any) -> None:
    if isinstance(packages, str):
        raise DefinitionError(f"{where}: apt takes a list of packages, not one text")
    for package in packages:
        if not isinstance(package, str) or not _APT_PACKAGE.match(package):
            raise DefinitionError(
                f"{where}: apt: {package!r} is no package. Write a name, such as 'libgomp1', or one with its "
                "version, such as 'git=1:2.39.*'."
            )


def _read(where: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DefinitionError(f"{where}: {path} can't be read: {error.strerror}") from error


def _read_yaml(where: str, path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(_read(where, path))
    except yaml.YAMLError as error:
        raise DefinitionError(f"{where}: {path} is no YAML: {error}") from error
    if not isinstance(content, dict) or "dependencies" not in content:
        raise DefinitionError(f"{where}: {path} is no conda file: it has no 'dependencies'")
    return content
