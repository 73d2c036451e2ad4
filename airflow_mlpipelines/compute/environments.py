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
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.base import (
    ResolvedEnvironment,
    digest_variables,
    name_environment,
)
from airflow_mlpipelines.compute.conda_environments import install_conda
from airflow_mlpipelines.compute.environment_locks import (
    environments_directory,
    exclusive_lock,
    find_lock,
    run_uv,
    write_whole,
)
from airflow_mlpipelines.compute.interpreter import installed_packages, python_version
from airflow_mlpipelines.exceptions import EnvironmentBuildError

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.compute.environment_locks import EnvironmentLock
    from airflow_mlpipelines.definition.graph import EnvironmentSpec


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
        lock = find_lock(environment)
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
    lock = find_lock(environment)
    python = lock.directory / "bin" / "python"
    if not _is_ready(lock):
        _build(environment, lock, emit)
    return replace(resolved, python=str(python))


def is_python_ready(environment: EnvironmentSpec | None) -> bool:
    """Return whether an environment that was resolved is there to run on."""
    if environment is None or not environment.has_packages:
        return True
    return _is_ready(find_lock(environment))


def interpreter_variables(python: str, path: str | None) -> dict[str, str]:
    """Return the variables that make an interpreter the one that ``python`` means in a process.

    Args:
        python: The interpreter.
        path: The worker's ``PATH``.
    """
    directory = Path(python).parent
    variables = {"PATH": os.pathsep.join([str(directory), path or os.defpath])}
    if directory.parent.parent == environments_directory():
        is_conda = (directory.parent / "conda-meta").is_dir()
        variables["CONDA_PREFIX" if is_conda else "VIRTUAL_ENV"] = str(directory.parent)
    return variables


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
        began = time.monotonic()
        failure = f"{name_environment(environment)} can't be built"
        _ready_file(lock).unlink(missing_ok=True)
        shutil.rmtree(lock.directory, ignore_errors=True)
        target = str(lock.directory)
        base = lock.directory.parent
        install = "sync"
        if lock.conda:
            install_conda(environment, lock.conda, lock.directory)
            install = "install"  # what is there stays
        else:
            run_uv(["venv", "--no-project", "--python", lock.interpreter, target], failure, base)
        with tempfile.TemporaryDirectory(prefix="mlpipelines-lock-") as name:
            pylock = Path(name) / "pylock.toml"
            pylock.write_text(lock.pylock, encoding="utf-8")
            python = str(lock.directory / "bin" / "python")
            # Compiled now, or else by every step that imports it first, all at once.
            options = ["--python", python, "--compile-bytecode"]
            files = [str(pylock)] if install == "sync" else ["-r", str(pylock)]
            if lock.pylock:
                run_uv(["pip", install, *files, *options], failure, base, emit=emit)
        write_whole(_ready_file(lock), json.dumps(lock.packages))
        took = time.monotonic() - began
        emit(f"Built {name_environment(environment)} in {target} in {took:.1f} s")
