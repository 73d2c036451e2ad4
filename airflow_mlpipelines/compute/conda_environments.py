"""Conda files for processes of the worker's machine: solved once, and installed where uv's environments are.

py-rattler does both, so that no conda, mamba or micromamba has to be there. A file that asks for Python
and pip packages alone needs none of it: uv makes such environments.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines import settings
from airflow_mlpipelines.compute.base import name_environment
from airflow_mlpipelines.compute.build_failures import is_network_failure
from airflow_mlpipelines.exceptions import EnvironmentBuildError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rattler import RepoDataRecord

    from airflow_mlpipelines.definition.graph import EnvironmentSpec

_DEFAULT_CHANNELS = ("conda-forge",)
_DEFAULTS = "defaults"
_NO_DEFAULTS = "nodefaults"
_EXACT_PYTHON = re.compile(r"^python\s*={1,2}\s*(\d+\.\d+(?:\.\d+)?)(?:\.\*)?$")
_SHOWN = 2000


def without_conda(environment: EnvironmentSpec) -> EnvironmentSpec:
    """Return the environment with a conda file of Python and pip packages alone as what it comes down to.

    One that needs conda packages keeps its file, without the pip packages in it, which go to ``pip``.

    Raises:
        EnvironmentBuildError: The file can't be understood, or wants another Python than the environment.
    """
    if environment.conda is None:
        return environment
    specs, pip = _read_dependencies(environment)
    pip = (*pip, *environment.pip)
    pythons = [match[1] for spec in specs if (match := _EXACT_PYTHON.match(spec))]
    wanted = environment.python_version
    if wanted is not None and pythons and not f"{pythons[0]}.".startswith(f"{wanted}."):
        raise EnvironmentBuildError(
            f"{name_environment(environment)}: python_version is {wanted}, but its conda file says {pythons[0]}. "
            "Leave one of them out."
        )
    if pythons and all(spec == "pip" or _EXACT_PYTHON.match(spec) for spec in specs):
        changes = {"conda": None, "pip": pip, "python_version": pythons[0]}
        return environment.model_copy(update=changes)
    if not any(re.match(r"python(\W|$)", spec.rpartition("::")[2]) for spec in specs):
        if wanted is None:
            raise EnvironmentBuildError(
                f"{name_environment(environment)}: its conda file has no python among its dependencies. Add "
                "such as 'python=3.12'."
            )
        specs = [*specs, f"python={wanted}"]
    conda = {"channels": _channels(environment), "dependencies": specs}
    return environment.model_copy(update={"conda": conda, "pip": pip})


def solve_conda(environment: EnvironmentSpec) -> list[dict[str, Any]]:
    """Return the packages that a conda file comes down to on this machine, each as conda's index has it.

    Raises:
        EnvironmentBuildError: They can't be had together, or a channel can't be read.
    """
    rattler = _import_rattler(environment)
    conda: Mapping[str, Any] = environment.conda or {}

    async def solve() -> list[RepoDataRecord]:
        found: list[RepoDataRecord] = await rattler.solve(
            [rattler.Channel(channel) for channel in conda["channels"]],
            [rattler.MatchSpec(spec, strict=False) for spec in conda["dependencies"]],
            gateway=rattler.Gateway(cache_dir=str(_cache() / "channels")),
            virtual_packages=[item.into_generic() for item in rattler.VirtualPackage.detect()],
        )
        return found

    records = _run(
        solve(), f"The conda packages of {name_environment(environment)} can't be resolved"
    )
    return sorted(
        (json.loads(record.to_json()) for record in records), key=lambda item: item["name"]
    )


def install_conda(
    environment: EnvironmentSpec, packages: Sequence[Mapping[str, Any]], target: Path
) -> None:
    """Install what :func:`solve_conda` has returned into a directory that is not there yet.

    Scripts that packages bring for the time after their installation are not run.

    Raises:
        EnvironmentBuildError: A package can't be had.
    """
    rattler = _import_rattler(environment)
    failure = f"{name_environment(environment)} can't be built"

    async def install() -> None:
        with tempfile.TemporaryDirectory(prefix="mlpipelines-conda-") as name:
            index = Path(name) / "index.json"
            records = []
            for package in packages:
                index.write_text(json.dumps(package), encoding="utf-8")
                record = rattler.PackageRecord.from_index_json(
                    index,
                    size=package.get("size"),
                    sha256=package.get("sha256"),
                    md5=package.get("md5"),
                )
                records.append(
                    rattler.RepoDataRecord(
                        record, package["fn"], package["url"], package["channel"]
                    )
                )
        await rattler.install(records, target, cache_dir=_cache() / "packages", show_progress=False)

    _run(install(), failure)


def describe_conda(packages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return each package's name, and its version with the content that it is known by."""
    return {
        f"conda {package['name']}": f"{package['version']} ({package['build']}, {package.get('sha256', '')[:12]})"
        for package in packages
    }


def _read_dependencies(environment: EnvironmentSpec) -> tuple[list[str], tuple[str, ...]]:
    """Return the conda packages and the pip packages of the file."""
    specs: list[str] = []
    pip: list[str] = []
    named = name_environment(environment)
    dependencies: Any = (environment.conda or {}).get("dependencies") or []
    for item in dependencies:
        if isinstance(item, str):
            specs.append(item.strip())
        elif isinstance(item, dict) and item.keys() == {"pip"}:
            pip += [str(line) for line in item["pip"] or ()]
        else:
            raise EnvironmentBuildError(
                f"{named}: {item!r} among the dependencies of its conda file is neither a package nor a list of "
                "pip packages."
            )
    return specs, tuple(pip)


def _channels(environment: EnvironmentSpec) -> list[str]:
    named: Any = (environment.conda or {}).get("channels") or _DEFAULT_CHANNELS
    if _DEFAULTS in named:
        raise EnvironmentBuildError(
            f"{name_environment(environment)}: what the channel {_DEFAULTS!r} is says a configuration of conda, "
            "which is not used here. Name channels, such as 'conda-forge', or their addresses."
        )
    return [str(channel) for channel in named if channel != _NO_DEFAULTS]


def _cache() -> Path:
    return settings.home() / "conda"


def _import_rattler(environment: EnvironmentSpec) -> Any:
    try:
        import rattler
    except ImportError as error:
        raise EnvironmentBuildError(
            f"{name_environment(environment)} has conda packages, for which py-rattler is not installed beside this "
            "package. Install it: pip install 'airflow-mlpipelines[conda]'; or give their pip requirements instead, "
            "or an image that has them and a Docker compute."
        ) from error
    return rattler


def _run(work: Any, failure: str) -> Any:
    """Return what ``work`` returns, to its end.

    Raises:
        EnvironmentBuildError: It fails; the message begins with ``failure``.
    """
    import asyncio

    try:
        return asyncio.run(work)
    except Exception as error:
        if type(error).__module__ != "exceptions":  # those of rattler have no common base
            raise
        said = str(error)[:_SHOWN]
        raise EnvironmentBuildError(
            f"{failure}: {said}", retryable=is_network_failure(said)
        ) from error
