"""Python environments for steps that run as processes: resolved once, built once, then only looked at.

An environment without packages is the worker's own interpreter. For one with packages, uv resolves
the requirements when it is first met, and what it chose is *locked*: the same environment means the
same versions until somebody deletes the lock, however the package index changes. What is then built
is named by the content of the lock, so nothing that a running step uses is ever changed.

``$AIRFLOW_HOME/mlpipelines/environments/``::

    locks/<digest of the definition>.json     the interpreter and each package, as uv's pylock
    <digest of the lock>/bin/python           the environment
    <digest of the lock>.ready                written last: without it, the environment is built anew
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from airflow_mlpipelines import settings
from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.compute.base import (
    ResolvedEnvironment,
    digest_variables,
    name_environment,
)
from airflow_mlpipelines.compute.build_failures import is_network_failure
from airflow_mlpipelines.compute.interpreter import installed_packages, python_version
from airflow_mlpipelines.exceptions import DataError, EnvironmentBuildError
from airflow_mlpipelines.storage.trees import digest_tree

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.definition.graph import EnvironmentSpec

_LOCK_VERSION = 1
_SHOWN_LINES = 30


@dataclass(frozen=True)
class EnvironmentLock:
    """What an environment with packages was resolved to on this machine.

    Attributes:
        python: The interpreter's full version.
        interpreter: The interpreter that the environment is made from.
        packages: Each package's name and version, with its content where it comes from no index.
        pylock: The same for uv, with places and hashes (PEP 751).
        states: The state of each local file or directory that the lock depends upon.
    """

    python: str
    interpreter: str
    packages: dict[str, str]
    pylock: str
    states: dict[str, str]

    @property
    def directory(self) -> Path:
        """Where the environment is built."""
        built = digest("built-environment-v1", [self.python, self.interpreter, self.pylock])
        return environments_directory() / built[:32]

    @property
    def is_current(self) -> bool:
        """Whether the interpreter and the local packages are still what was locked."""
        return all(_state(Path(path)) == state for path, state in self.states.items())


def environments_directory() -> Path:
    """Return where this machine keeps the environments that it has built."""
    return settings.home() / "environments"


def resolve_python(environment: EnvironmentSpec | None, *, compute: str) -> ResolvedEnvironment:
    """Return what an environment comes down to for a process on this machine.

    An image is for computes with containers: where an environment has packages as well, a process
    gets the packages.

    Args:
        environment: The environment; None is the worker's own interpreter.
        compute: The name of the compute, for messages.

    Raises:
        EnvironmentBuildError: It can't be resolved, or not for a process.
    """
    if environment is not None and environment.apt:
        raise EnvironmentBuildError(
            f"{name_environment(environment)} has apt packages, which a process of the worker's machine can't be "
            f"given. Name a Docker compute instead of {compute!r}, or leave them out."
        )
    if environment is None or not environment.has_packages:
        if environment is not None and (environment.image or environment.dockerfile):
            raise EnvironmentBuildError(
                f"{name_environment(environment)} is an image, but compute {compute!r} runs processes of the worker's "
                "machine. Name a Docker compute, or give the environment pip requirements for processes."
            )
        python, packages = python_version(), installed_packages()
    else:
        lock = _find_lock(environment)
        python, packages = lock.python, lock.packages
    return ResolvedEnvironment(
        description={
            "kind": "python",
            "python": python,
            "packages": packages,
            "variables": digest_variables(environment),
        }
    )


def prepare_python(
    environment: EnvironmentSpec | None, resolved: ResolvedEnvironment, *, emit: Emit
) -> ResolvedEnvironment:
    """Return ``resolved`` with its interpreter, and its packages installed there.

    Raises:
        EnvironmentBuildError: They can't be installed.
    """
    if environment is None or not environment.has_packages:
        return replace(resolved, python=sys.executable)
    lock = _find_lock(environment)
    python = lock.directory / "bin" / "python"
    if not _is_ready(lock):
        _build(environment, lock, emit)
    return replace(resolved, python=str(python))


def is_python_ready(environment: EnvironmentSpec | None) -> bool:
    """Return whether an environment that was resolved is there to run on."""
    if environment is None or not environment.has_packages:
        return True
    return _is_ready(_find_lock(environment))


def interpreter_variables(python: str, path: str | None) -> dict[str, str]:
    """Return the variables that make an interpreter the one that ``python`` means in a process.

    Args:
        python: The interpreter.
        path: The worker's ``PATH``.
    """
    directory = Path(python).parent
    variables = {"PATH": os.pathsep.join([str(directory), path or os.defpath])}
    if directory.parent.parent == environments_directory():
        variables["VIRTUAL_ENV"] = str(directory.parent)
    return variables


# ---- the lock ----------------------------------------------------------------------------------


def _find_lock(environment: EnvironmentSpec) -> EnvironmentLock:
    """Return the lock of an environment, resolved now if it was not, or if it is out of date."""
    if environment.conda is not None:
        raise EnvironmentBuildError(
            f"{name_environment(environment)} has conda packages, which this release can't build. Give their pip "
            "requirements instead, or an image that has them and a Docker compute."
        )
    key = digest(
        "python-environment-v1",
        {
            "python": environment.python_version,
            "own": python_version() if environment.python_version is None else None,
            "pip": environment.pip,
            "platform": sysconfig.get_platform(),
        },
    )
    file = environments_directory() / "locks" / f"{key[:32]}.json"
    lock = _read_lock(file)
    if lock is None:
        with exclusive_lock(file):
            lock = _read_lock(file)
            if lock is None:
                lock = _resolve(environment)
                _write_whole(file, json.dumps({"version": _LOCK_VERSION, **asdict(lock)}))
    return lock


def _read_lock(file: Path) -> EnvironmentLock | None:
    """Return a lock that still holds, or None. One of another release, or half of one, is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("version", None) != _LOCK_VERSION:
            return None
        lock = EnvironmentLock(**data)
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None
    return lock if lock.is_current else None


def _resolve(environment: EnvironmentSpec) -> EnvironmentLock:
    interpreter = _find_interpreter(environment)
    with tempfile.TemporaryDirectory(prefix="mlpipelines-lock-") as name:
        directory = Path(name)
        requirements = "".join(f"{line}\n" for line in environment.pip)
        (directory / "requirements.in").write_text(requirements, encoding="utf-8")
        output = ["--output-file", "pylock.toml", "--format", "pylock.toml", "--no-header"]
        _uv(
            ["pip", "compile", "requirements.in", "--python", interpreter, *output],
            f"The packages of {name_environment(environment)} can't be resolved",
            directory,
        )
        pylock = (directory / "pylock.toml").read_text(encoding="utf-8")
        version = _uv(
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


def _find_interpreter(environment: EnvironmentSpec) -> str:
    """Return an interpreter of the version asked for: the worker's own if it fits, else what uv finds."""
    wanted = environment.python_version
    if wanted is None or python_version() == wanted or python_version().startswith(f"{wanted}."):
        return sys.executable
    return _uv(
        ["python", "find", "--no-project", "--system", wanted],
        f"This machine has no usable Python {wanted} for {name_environment(environment)}. Install one and put it on the "
        "worker's PATH, or name an image and a Docker compute",
        Path("/"),
    ).strip()


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


# ---- the built environment ---------------------------------------------------------------------


def _ready_file(lock: EnvironmentLock) -> Path:
    return lock.directory.with_suffix(".ready")


def _is_ready(lock: EnvironmentLock) -> bool:
    # A link to an interpreter that was removed since does not exist either.
    return _ready_file(lock).exists() and (lock.directory / "bin" / "python").exists()


def _build(environment: EnvironmentSpec, lock: EnvironmentLock, emit: Emit) -> None:
    """Build the environment in its place, unless somebody else does so while we wait."""
    with exclusive_lock(lock.directory):
        if _is_ready(lock):
            return
        count = len(lock.packages)
        emit(
            f"Building {name_environment(environment)}: Python {lock.python} and {count} "
            f"package{'s' if count != 1 else ''}. This is done once on this machine."
        )
        failure = f"{name_environment(environment)} can't be built"
        _ready_file(lock).unlink(missing_ok=True)
        shutil.rmtree(lock.directory, ignore_errors=True)
        target = str(lock.directory)
        base = lock.directory.parent
        _uv(["venv", "--no-project", "--python", lock.interpreter, target], failure, base)
        with tempfile.TemporaryDirectory(prefix="mlpipelines-lock-") as name:
            pylock = Path(name) / "pylock.toml"
            pylock.write_text(lock.pylock, encoding="utf-8")
            python = str(lock.directory / "bin" / "python")
            # Compiled now, or else by every step that imports it first, all at once.
            _uv(
                ["pip", "sync", str(pylock), "--python", python, "--compile-bytecode"],
                failure,
                base,
            )
        _write_whole(_ready_file(lock), json.dumps(lock.packages))
        emit(f"Built {name_environment(environment)} in {target}")


def _uv(arguments: list[str], failure: str, directory: Path) -> str:
    """Return what uv prints.

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
    # What this machine has: the worker's own virtual environment does not count, and nothing is fetched.
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    env |= {"UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1"}
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
    return done.stdout


def exclusive_lock(path: Path) -> FileLock:
    """Return a lock that one process of this machine holds at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_suffix(".lock"))


def _write_whole(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
