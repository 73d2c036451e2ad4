"""What a failed installation comes to in words: what to do about it, and whether trying again can help."""

from __future__ import annotations

import re
from collections.abc import Callable

from airflow_mlpipelines.compute.recipes import MARK

_NETWORK = re.compile(
    r"temporary failure (in name resolution|resolving)|name or service not known|could not resolve|"
    r"no such host|connection (refused|reset|timed out|aborted)|network is unreachable|read timed out|"
    r"dns error|i/o timeout|TLS handshake timeout|timed out while|failed to establish a new connection|"
    r"(502 bad gateway|503 service unavailable|504 gateway)",
    re.I,
)
# At the beginning of a line, or after BuildKit's number and time: else it is our instruction itself.
_SAID = rf"^(?:#\d+ [\d.]+ )?{MARK}"
_Say = Callable[[re.Match[str]], str]
_HINTS: tuple[tuple[re.Pattern[str], _Say], ...] = (
    (
        re.compile(rf"{_SAID} (the base image has neither conda.*)", re.M),
        lambda match: (
            f"{match[1]}. Name one that has, or give pip requirements instead of a conda file"
        ),
    ),
    (
        re.compile(rf"{_SAID} (the base image has Python.*)", re.M),
        lambda match: f"{match[1]}. Name an image= with it, or leave the image to python_version=",
    ),
    (
        re.compile(r"dockerfile parse error.*", re.I),
        lambda match: f"its Dockerfile can't be read: {match[0]}",
    ),
    (
        re.compile(r"No module named pip"),
        lambda _: (
            "the base image's Python has no pip. Name another base image, or add apt=['python3-pip']"
        ),
    ),
    (
        re.compile(r"python3: (command )?not found"),
        lambda _: (
            "the base image has no python3. Name one that has, or add apt=['python3', 'python3-pip']"
        ),
    ),
    (
        re.compile(r"apt-get: (command )?not found"),
        lambda _: (
            "the base image has no apt-get: it is no Debian or Ubuntu. Use a dockerfile= with its own tool"
        ),
    ),
    (
        re.compile(r"E: (Unable to locate package \S+|Version '.*' for '.*' was not found)"),
        lambda match: f"apt says: {match[1]}. Correct apt=",
    ),
    (
        re.compile(r"No matching distribution found for (.+)"),
        lambda match: (
            f"pip finds no {match[1].strip()}. Correct the requirement, or the Python version"
        ),
    ),
    (
        re.compile(r"ResolutionImpossible|conflicting dependencies"),
        lambda _: "the requirements contradict each other",
    ),
    (
        re.compile(r"(COPY|ADD) failed|failed to compute cache key"),
        lambda _: (
            "a Dockerfile can only copy what it makes itself: no other file of yours is in the build "
            "context. Put the files into the base image, or into the step's source_directory"
        ),
    ),
    (
        re.compile(r"no space left on device", re.I),
        lambda _: "the Docker daemon's disk is full",
    ),
)


def find_hint(text: str) -> str | None:
    """Return what is wrong and what to do, where the log of a build tells it; no full stop at the end."""
    for pattern, say in _HINTS:
        if match := pattern.search(text):
            return say(match)
    return None


def is_network_failure(text: str) -> bool:
    """Return whether the log tells of a network that failed, so that trying again may help."""
    return bool(_NETWORK.search(text))
