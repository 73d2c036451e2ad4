"""Building an image: with BuildKit where the worker has ``docker buildx``, else by the daemon itself."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.build_log import BuildLog, build_failure, run_builder
from airflow_mlpipelines.compute.docker.daemon import daemon_url, unreachable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.compute.build_context import BuildContext
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

_DOCKER = "docker"
_REQUEST_ERRORS = range(400, 500)
_NO_DAEMON = re.compile(
    r"^ERROR: .*(Cannot connect to the Docker daemon|error reading from server)"
)


def build_image(
    client: APIClient,
    compute: DockerComputeSpec,
    context: BuildContext,
    *,
    tag: str,
    labels: Mapping[str, str],
    named: str,
    emit: Emit,
) -> None:
    """Build an image and leave it on the daemon under ``tag``.

    Args:
        client: A connection to the daemon.
        compute: The daemon's compute.
        context: What to build; its bases are on the daemon.
        tag: The image's name.
        labels: The image's labels.
        named: How messages call the environment.
        emit: Takes the build's log.

    Raises:
        EnvironmentBuildError: An instruction failed; with it, and the end of the log.
        ComputeUnavailableError: The daemon went away.
    """
    log = BuildLog(emit)
    if has_buildx():
        _build_with_buildx(compute, context, tag=tag, labels=labels, named=named, log=log)
    else:
        _build_with_daemon(client, compute, context, tag=tag, labels=labels, named=named, log=log)


@functools.cache
def has_buildx() -> bool:
    """Return whether this machine's Docker command line can build with BuildKit."""
    try:
        done = subprocess.run(
            [_DOCKER, "buildx", "version"], capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _build_with_daemon(
    client: APIClient,
    compute: DockerComputeSpec,
    context: BuildContext,
    *,
    tag: str,
    labels: Mapping[str, str],
    named: str,
    log: BuildLog,
) -> None:
    from docker.errors import APIError
    from urllib3.exceptions import HTTPError

    try:
        with context.open_archive() as archive:
            messages = client.build(
                fileobj=archive,
                custom_context=True,
                tag=tag,
                labels=dict(labels),
                rm=True,
                forcerm=True,
                decode=True,
                timeout=None,  # an instruction may be silent for long
            )
            said = _follow(messages, log)
    except APIError as error:
        # Refused before anything was built: the Dockerfile can't be read, for example.
        said = str(error.explanation or error)
        if error.status_code not in _REQUEST_ERRORS and "parse error" not in said:
            raise build_failure(named, log, said, retryable=True) from error
    except (OSError, HTTPError) as error:  # requests' errors are OSErrors
        raise unreachable(compute, f"the build of {named} was cut off: {error}") from error
    if said is not None:
        raise build_failure(named, log, said)


def _follow(messages: Iterable[Any], log: BuildLog) -> str | None:
    """Hand the log on; return why the build failed, or None."""
    for message in messages:
        if "stream" in message:
            log.feed(str(message["stream"]))
        elif "error" in message:
            log.finish()
            detail = message.get("errorDetail") or {}
            return str(detail.get("message") or message["error"])
    log.finish()
    return None


def _build_with_buildx(
    compute: DockerComputeSpec,
    context: BuildContext,
    *,
    tag: str,
    labels: Mapping[str, str],
    named: str,
    log: BuildLog,
) -> None:
    # The builder inside the daemon: it has the daemon's own images to build upon.
    command = [_DOCKER, "buildx", "build", "--builder", "default", "--progress", "plain"]
    command += ["--load", "--tag", tag]
    for name, value in labels.items():
        command += ["--label", f"{name}={value}"]
    env = {name: value for name, value in os.environ.items() if name != "DOCKER_CONTEXT"}
    # The SDK takes unix://var/run/docker.sock for what is in the root directory, the command line does not.
    url = re.sub(r"^unix:/*", "unix:///", daemon_url(compute))
    env |= {"DOCKER_HOST": url, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    with tempfile.TemporaryDirectory(prefix="mlpipelines-build-") as name:
        directory = Path(name) / "context"
        context.write(directory)
        code = run_builder([*command, str(directory)], env=env, log=log)
    if code != 0:
        if any(_NO_DAEMON.search(line) for line in log.tail):
            raise unreachable(compute, f"the build of {named} was cut off: {log.tail[-1]}")
        said = next((line for line in reversed(log.tail) if line.startswith("ERROR")), "")
        raise build_failure(named, log, said)
