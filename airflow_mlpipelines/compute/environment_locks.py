"""What a Python environment with packages was resolved to on this machine: its lock, kept in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from airflow_mlpipelines import settings
from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.compute.base import name_environment
from airflow_mlpipelines.compute.build_context import prepare_directory
from airflow_mlpipelines.compute.build_failures import is_network_failure
from airflow_mlpipelines.compute.conda_environments import (
    describe_conda,
    solve_conda,
    without_conda,
)
from airflow_mlpipelines.compute.interpreter import python_version
from airflow_mlpipelines.exceptions import DataError, EnvironmentBuildError
from airflow_mlpipelines.storage.trees import digest_tree

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.definition.graph import EnvironmentSpec

_LOCK_VERSION = 1
_SHOWN_LINES = 30
_PYLOCK = "pylock.toml"
_EXPLICIT = "conda-explicit.txt"


@dataclass(frozen=True)
class EnvironmentLock:
    """What an environment with packages was resolved to on this machine.

    Attributes:
        python: The interpreter's full version.
        interpreter: The interpreter that the environment is made from.
        packages: Each package's name and version, with its content where it comes from no index.
        pylock: The same for uv, with places and hashes (PEP 751).
        states: The state of each local file or directory that the lock depends upon.
        conda: The conda packages, as conda's index has them, if the environment is made from such. Python is
            one of them then, and the interpreter is the one in the environment.
    """

    python: str
    interpreter: str
    packages: dict[str, str]
    pylock: str
    states: dict[str, str]
    conda: tuple[dict[str, Any], ...] = ()

    @property
    def directory(self) -> Path:
        """Where the environment is built."""
        made_of: list[Any] = [self.python, self.interpreter, self.pylock]
        built = digest("built-environment-v1", made_of + ([list(self.conda)] if self.conda else []))
        return environments_directory() / built[:32]

    @property
    def is_current(self) -> bool:
        """Whether the interpreter and the local packages are still what was locked."""
        return all(_state(Path(path)) == state for path, state in self.states.items())

    def export(self, directory: Path) -> list[str]:
        """Write the lock into a directory, in the forms that uv and conda read; return the commands that do.

        Raises:
            DefinitionError: The directory is not empty.
        """
        prepare_directory(directory)
        commands = []
        target = f"{directory}/made"
        if self.conda:
            explicit = "".join(
                f"{item['url']}{'#' + item['md5'] if item.get('md5') else ''}\n"
                for item in self.conda
            )
            (directory / _EXPLICIT).write_text(f"@EXPLICIT\n{explicit}", encoding="utf-8")
            commands.append(f"micromamba create -y -p {target} -f {directory / _EXPLICIT}")
        else:
            commands.append(f"uv venv --python {self.python} {target}")
        if self.pylock:
            (directory / _PYLOCK).write_text(self.pylock, encoding="utf-8")
            how = (
                f"install -r {directory / _PYLOCK}" if self.conda else f"sync {directory / _PYLOCK}"
            )
            commands.append(f"uv pip {how} --python {target}/bin/python")
        return commands


def environments_directory() -> Path:
    """Return where this machine keeps the environments that it has built."""
    return settings.home() / "environments"


def find_lock(environment: EnvironmentSpec) -> EnvironmentLock:
    """Return the lock of an environment, resolved now if it was not, or if it is out of date."""
    environment = without_conda(environment)
    made_of: dict[str, Any] = {
        "python": environment.python_version,
        "own": python_version() if environment.python_version is None else None,
        "pip": environment.pip,
        "platform": sysconfig.get_platform(),
    }
    if environment.conda is not None:
        made_of |= {"own": None, "conda": environment.conda}
    key = digest("python-environment-v1", made_of)
    file = environments_directory() / "locks" / f"{key[:32]}.json"
    lock = _read_lock(file)
    if lock is None:
        with exclusive_lock(file):
            lock = _read_lock(file)
            if lock is None:
                lock = _resolve(environment)
                write_whole(file, json.dumps({"version": _LOCK_VERSION, **asdict(lock)}))
    return lock


def _read_lock(file: Path) -> EnvironmentLock | None:
    """Return a lock that still holds, or None. One of another release, or half of one, is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("version", None) != _LOCK_VERSION:
            return None
        lock = EnvironmentLock(**data | {"conda": tuple(data.get("conda", ()))})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None
    return lock if lock.is_current else None


def _resolve(environment: EnvironmentSpec) -> EnvironmentLock:
    if environment.conda is not None:
        return _resolve_conda(environment)
    interpreter = _find_interpreter(environment)
    with tempfile.TemporaryDirectory(prefix="mlpipelines-lock-") as name:
        directory = Path(name)
        requirements = "".join(f"{line}\n" for line in environment.pip)
        (directory / "requirements.in").write_text(requirements, encoding="utf-8")
        output = ["--output-file", _PYLOCK, "--format", _PYLOCK, "--no-header"]
        run_uv(
            ["pip", "compile", "requirements.in", "--python", interpreter, *output],
            f"The packages of {name_environment(environment)} can't be resolved",
            directory,
        )
        pylock = (directory / _PYLOCK).read_text(encoding="utf-8")
        version = run_uv(
            ["python", "find", "--show-version", interpreter],
            f"The interpreter of {name_environment(environment)} can't be used",
            directory,
        ).strip()
    packages, local = _read_pylock(pylock)
    return EnvironmentLock(
        python=version,
        interpreter=interpreter,
        packages=packages,
        pylock=pylock,
        states={path: _state(Path(path)) for path in (interpreter, *local)},
    )


def _resolve_conda(environment: EnvironmentSpec) -> EnvironmentLock:
    """Return the lock of conda packages, and of pip packages that leave those as they are."""
    conda = solve_conda(environment)
    versions = {package["name"]: package["version"] for package in conda}
    pylock, packages, local = "", dict[str, str](), list[str]()
    if environment.pip:
        with tempfile.TemporaryDirectory(prefix="mlpipelines-lock-") as name:
            directory = Path(name)
            pylock = _compile_beside(environment, directory, {"python": versions["python"]})
            packages, _ = _read_pylock(pylock)
            both = {name: versions[name] for name in packages if name in versions}
            if both:  # pip keeps what is there
                pylock = _compile_beside(
                    environment, directory, {"python": versions["python"], **both}
                )
            packages, local = _read_pylock(pylock)
    return EnvironmentLock(
        python=versions["python"],
        interpreter="",
        packages={**packages, **describe_conda(conda)},
        pylock=pylock,
        states={path: _state(Path(path)) for path in local},
        conda=tuple(conda),
    )


def _compile_beside(
    environment: EnvironmentSpec, directory: Path, versions: Mapping[str, str]
) -> str:
    """Return the pylock of an environment's pip packages beside packages of these versions."""
    requirements = "".join(f"{line}\n" for line in environment.pip)
    (directory / "requirements.in").write_text(requirements, encoding="utf-8")
    given = {name: version for name, version in versions.items() if name != "python"}
    constraints = "".join(f"{name}=={version}\n" for name, version in given.items())
    (directory / "constraints.txt").write_text(constraints, encoding="utf-8")
    output = ["--output-file", _PYLOCK, "--format", _PYLOCK, "--no-header"]
    target = ["--python-version", versions["python"]]
    run_uv(
        ["pip", "compile", "requirements.in", "-c", "constraints.txt", *target, *output],
        f"The pip packages of {name_environment(environment)} can't be resolved beside its conda packages",
        directory,
    )
    return (directory / _PYLOCK).read_text(encoding="utf-8")


def _find_interpreter(environment: EnvironmentSpec) -> str:
    """Return an interpreter of the version asked for: the worker's own if it fits, else what uv finds."""
    wanted = environment.python_version
    if wanted is None or python_version() == wanted or python_version().startswith(f"{wanted}."):
        return sys.executable
    named = name_environment(environment)
    find = ["python", "find", "--no-project", "--system", wanted]
    option = f"[{settings.CONFIG_SECTION}] {settings.PYTHON_DOWNLOADS_OPTION}"
    failure = (
        f"This machine has no usable Python {wanted} for {named}. Install one and put it on the worker's PATH; or let uv "
        f"download it: {option} = True in Airflow's configuration; or name an image and a Docker compute"
    )
    try:
        return run_uv(find, failure, Path("/")).strip()
    except EnvironmentBuildError:
        if not _may_download():
            raise
    install = ["python", "install", "--no-bin", wanted]
    run_uv(
        install,
        f"This machine has no usable Python {wanted} for {named}, and it can't be downloaded, as {option} asks for",
        Path("/"),
        downloads="automatic",
    )
    # Of what this machine has, uv's own is the one that was downloaded.
    return run_uv([*find, "--managed-python"], failure, Path("/")).strip()


def _may_download() -> bool:
    from airflow.sdk.configuration import conf

    found: bool = conf.getboolean(
        settings.CONFIG_SECTION, settings.PYTHON_DOWNLOADS_OPTION, fallback=False
    )
    return found


def _read_pylock(pylock: str) -> tuple[dict[str, str], list[str]]:
    """Return each package's name and version, and the local paths that packages come from.

    What comes from no index may change under one version, so its content is told as well.
    """
    packages: dict[str, str] = {}
    local: list[str] = []
    for package in tomllib.loads(pylock).get("packages", []):
        version = package.get("version", "")
        content = ""
        if "archive" in package:
            archive = package["archive"]
            content = ",".join(f"{kind}:{value}" for kind, value in archive["hashes"].items())
            local += [archive["path"]] if "path" in archive else []
        elif "vcs" in package:
            content = package["vcs"]["commit-id"]
        elif "directory" in package:
            path = package["directory"]["path"]
            content = _state(Path(path))
            local.append(path)
        packages[package["name"]] = f"{version} ({content})".strip() if content else version
    return dict(sorted(packages.items())), local


def _state(path: Path) -> str:
    """Return what changes when a local file or directory does; empty if it is not there."""
    try:
        status = path.stat()
        if path.is_dir():
            return digest_tree(path).digest
    except (OSError, DataError):
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def run_uv(
    arguments: list[str],
    failure: str,
    directory: Path,
    *,
    downloads: str = "never",
    emit: Emit | None = None,
) -> str:
    """Return what uv prints.

    Args:
        arguments: Its command and options.
        failure: What to say if it fails.
        directory: Where it works.
        downloads: Whether it may download Pythons, in its own words.
        emit: Takes what it told of its work, once that is done.

    Raises:
        EnvironmentBuildError: It fails; the message begins with ``failure``.
    """
    try:
        from uv import find_uv_bin

        program = os.fspath(find_uv_bin())
    except (ImportError, FileNotFoundError) as error:
        raise EnvironmentBuildError(
            f"{failure}: uv is not installed beside this package. Install it: pip install uv."
        ) from error
    # What this machine has: the worker's own virtual environment does not count.
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    env |= {"UV_PYTHON_DOWNLOADS": downloads, "NO_COLOR": "1"}
    done = subprocess.run(
        [program, *arguments],
        cwd=directory,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-_SHOWN_LINES:])
        raise EnvironmentBuildError(
            f"{failure}. uv says:\n{said}", retryable=is_network_failure(done.stderr)
        )
    if emit is not None:
        for line in done.stderr.splitlines():
            if line.strip() and not line.startswith("warning: "):
                emit(f"uv: {line.rstrip()}")
    return done.stdout


def exclusive_lock(path: Path) -> FileLock:
    """Return a lock that one process of this machine holds at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_suffix(".lock"))


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
