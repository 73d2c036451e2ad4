"""Looks at the Docker daemon that are not our own code's."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_SECONDS = 20.0


def docker_cli(*arguments: str) -> str:
    """Return what the Docker command line prints: a look at the daemon that is not our own code's."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Return the condition's first true value."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT_SECONDS:g} s in vain until {what}")
