"""The real parts that some tests need: found, or a reason to skip, or (in CI) to fail.

In CI every skip is a failure, however a test came to it: also by ``importorskip``, or by a mark. The few that may stay
are in :data:`ALLOWED_SKIPS`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REQUIRE_PARTS = "MLPIPELINES_REQUIRE_PARTS"
"""Set in CI: a missing part is a failure there, not a skip."""
ALLOWED_SKIPS = {
    "no Python 3.14": "no distribution that CI runs on has it yet",
    "this daemon has a GPU runtime": "those tests are about a daemon that has none, and a CI machine may have GPUs",
}
"""The reasons for which a test may be skipped in CI too, and why."""


def missing(reason: str) -> None:
    """Skip the test with ``reason``, or fail it at once where CI says that the part must be there."""
    if os.environ.get(REQUIRE_PARTS):
        pytest.fail(f"{reason} ({REQUIRE_PARTS} is set: this part must be here)")
    pytest.skip(reason)


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where CI says that all parts are there, but for :data:`ALLOWED_SKIPS`."""
    if not os.environ.get(REQUIRE_PARTS) or report.outcome != "skipped":
        return
    if hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return  # a test that has failed as it was expected to
    file, line, reason = report.longrepr
    reason = reason.removeprefix("Skipped: ")
    if reason not in ALLOWED_SKIPS:
        report.outcome = "failed"
        report.longrepr = (
            f"{file}:{line}: skipped: {reason}\n{REQUIRE_PARTS} is set, so that every test has to run; "
            "tests/parts.py lists the skips that may be."
        )


def require_docker() -> None:
    """Skip unless a Docker daemon answers."""
    if shutil.which("docker") is None:
        missing("no docker client")
    done = subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False)
    if done.returncode != 0:
        missing("no Docker daemon answers")


def find_compose() -> list[str]:
    """Return the command of docker compose: the machine's own, else what tests/compose/build.sh built, or skip."""
    own = ["docker", "compose"]
    if shutil.which("docker") is not None:
        probe = subprocess.run([*own, "version"], capture_output=True, check=False)
        if probe.returncode == 0:
            return own
    look = [Path(__file__).parent / "compose" / "build.sh", "--only-look"]
    found = subprocess.run(look, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        missing("no docker compose (tests/compose/build.sh builds it)")
    return [str(Path(found.stdout.strip()) / "docker-compose")]


def require_python(version: str) -> Path:
    """Return an interpreter of this minor version, such as ``3.8``, or skip."""
    found = shutil.which(f"python{version}")
    if found:
        probe = subprocess.run([found, "-c", "import sys"], capture_output=True, check=False)
        if probe.returncode == 0:
            return Path(found)
    root = os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv")
    for candidate in sorted(Path(root).glob(f"versions/{version}.*/bin/python")):
        return candidate
    pytest.skip(f"no Python {version}")


def require_torch() -> Path:
    """Return a Python that has PyTorch, in a folder that holds all of it, or skip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlpipelines-tests")
    for candidate in sorted(cache.glob("torch-*-v*/python")):
        probe = subprocess.run([candidate, "-c", "import torch"], capture_output=True, check=False)
        if probe.returncode == 0:
            return candidate
    missing("no PyTorch (.ci/torch.sh unpacks the distribution's)")
    raise AssertionError
