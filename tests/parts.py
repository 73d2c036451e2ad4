"""The real parts that some tests need: found, or a reason to skip, or (in CI) to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REQUIRE_PARTS = "MLPIPELINES_REQUIRE_PARTS"
"""Set in CI: a missing part is a failure there, not a skip."""


def missing(reason: str) -> None:
    """Skip the test with ``reason``, or fail it where CI says that the part must be there."""
    if os.environ.get(REQUIRE_PARTS):
        pytest.fail(f"{reason} ({REQUIRE_PARTS} is set: this part must be here)")
    pytest.skip(reason)


def require_docker() -> None:
    """Skip unless a Docker daemon answers."""
    if shutil.which("docker") is None:
        missing("no docker client")
    done = subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False)
    if done.returncode != 0:
        missing("no Docker daemon answers")


def require_python(version: str, *, optional: bool = False) -> Path:
    """Return an interpreter of this minor version, such as ``3.8``, or skip.

    One that is ``optional`` may be missing in CI too: no distribution there has it yet.
    """
    found = shutil.which(f"python{version}")
    if found:
        probe = subprocess.run([found, "-c", "import sys"], capture_output=True, check=False)
        if probe.returncode == 0:
            return Path(found)
    root = os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv")
    for candidate in sorted(Path(root).glob(f"versions/{version}.*/bin/python")):
        return candidate
    if optional:
        pytest.skip(f"no Python {version}")
    missing(f"no Python {version}")
    raise AssertionError


def require_torch() -> Path:
    """Return a Python that has PyTorch, in a folder that holds all of it, or skip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlpipelines-tests")
    for candidate in sorted(cache.glob("torch-*-v*/python")):
        probe = subprocess.run([candidate, "-c", "import torch"], capture_output=True, check=False)
        if probe.returncode == 0:
            return candidate
    missing("no PyTorch (.ci/torch.sh unpacks the distribution's)")
    raise AssertionError
