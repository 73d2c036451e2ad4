"""Putting the runtime package where a step's process finds it: a directory for ``PYTHONPATH``.

It holds ``airflow_mlpipelines`` with what works in any process and nothing else: a lazy ``__init__``,
``runtime`` and the ``azureml.core`` shim. Worker side, and never part of what it stages.
"""

from __future__ import annotations

import hashlib
import os
import py_compile
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_STAGED = (
    "__init__.py",
    "azureml/__init__.py",
    "azureml/core/__init__.py",
    "runtime/__init__.py",
    "runtime/connection.py",
    "runtime/contract.py",
    "runtime/gang.py",
    "runtime/log_lines.py",
    "runtime/metrics.py",
    "runtime/mpi.py",
    "runtime/node_shell.py",
    "runtime/nodes.py",
    "runtime/ranks.py",
    "runtime/rendezvous.py",
    "runtime/run.py",
)


def stage_runtime(target: Path) -> Path:
    """Return a directory below ``target`` for ``PYTHONPATH``, with the runtime package in it.

    It is named by its content and made once: another release gets another one, so that no running
    step loses its own, and a step on a machine that has it pays for reading a few small files.
    """
    files = {name: (_PACKAGE / name).read_bytes() for name in _STAGED}
    content = hashlib.sha256()
    for name, data in files.items():
        content.update(f"{name}\0{len(data)}\0".encode() + data)
    staged = target / content.hexdigest()[:16]
    if not staged.is_dir():
        _make(staged, files)
    return staged


def _make(staged: Path, files: dict[str, bytes]) -> None:
    staged.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=staged.parent, prefix=".staging-"))
    try:
        root = temporary / _PACKAGE.name
        for name, data in files.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            # For steps that run on this very interpreter; others compile what they import.
            final = str(staged / _PACKAGE.name / name)
            py_compile.compile(str(file), dfile=final, doraise=True, quiet=1)
        temporary.chmod(0o755)  # a container's user need not be the worker's
        with suppress(OSError):  # somebody else made it meanwhile
            os.replace(temporary, staged)  # noqa: PTH105
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
