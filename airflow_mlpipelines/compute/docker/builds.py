"""Building an image: with BuildKit where the worker has ``docker buildx``, else by the daemon itself."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.build_failures import find_hint, is_network_failure
from airflow_mlpipelines.compute.docker.daemon import daemon_url, unreachable
from airflow_mlpipelines.exceptions import EnvironmentBuildError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.compute.build_context import BuildContext
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

_DOCKER = "docker"
_TAIL_LINES = 30
_SHOWN_CHARACTERS = 500
_SHOWN_INSTRUCTION = 200
_REQUEST_ERRORS = range(400, 500)
_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NOISE = re.compile(r"^( ---> |Removing intermediate container |#\d+ (DONE|CACHED|sha256:)|\s*$)")
_CLASSIC_STEP = re.compile(r"^Step \d+/\d+ : (.*)$")
_BUILDKIT_STEP = re.compile(r"^#(\d+) \[[^\]]*\d+/\d+\] (.*)$")
_BUILDKIT_ERROR = re.compile(r"^#(\d+) ERROR:? (.*)$")
_NO_DAEMON = re.compile(
    r"^ERROR: .*(Cannot connect to the Docker daemon|error reading from server)"
)
_EXIT_CODE = re.compile(r"(?:returned a non-zero code|exit code): (\d+)")


class BuildLog:
    """The log of a build, line by line: handed on, its end kept, and the instruction at work known."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._rest = ""
        self._steps: dict[str, str] = {}
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.instruction: str | None = None

    def feed(self, text: str) -> None:
        """Take a piece of the log, which may end in the middle of a line."""
        *lines, self._rest = (self._rest + text).replace("\r\n", "\n").split("\n")
        for line in lines:
            self._take(line)

    def finish(self) -> None:
        """Take what is left of a log that ends without a line end."""
        if self._rest:
            self._take(self._rest)
            self._rest = ""

    def _take(self, raw: str) -> None:
        line = _CODES.sub("", raw).rpartition("\r")[2].rstrip()
        if match := _CLASSIC_STEP.match(line):
            self.instruction = match[1]
        elif match := _BUILDKIT_STEP.match(line):
            self._steps[match[1]] = match[2]
        elif match := _BUILDKIT_ERROR.match(line):  # several instructions may be at work at once
            self.instruction = self._steps.get(match[1])
        if _NOISE.match(line):
            return
        self.tail.append(line[:_SHOWN_CHARACTERS])
        self._emit(line)


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
            raise _failure(named, log, said, retryable=True) from error
    except (OSError, HTTPError) as error:  # requests' errors are OSErrors
        raise unreachable(compute, f"the build of {named} was cut off: {error}") from error
    if said is not None:
        raise _failure(named, log, said)


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
        process = subprocess.Popen(
            [*command, str(directory)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            for piece in process.stdout or ():
                log.feed(piece)
            code = process.wait()
        finally:
            process.kill()  # where somebody interrupts us, so that the build ends too
            process.wait()
    log.finish()
    if code != 0:
        if any(_NO_DAEMON.search(line) for line in log.tail):
            raise unreachable(compute, f"the build of {named} was cut off: {log.tail[-1]}")
        said = next((line for line in reversed(log.tail) if line.startswith("ERROR")), "")
        raise _failure(named, log, said)


def _failure(
    named: str, log: BuildLog, said: str, *, retryable: bool = False
) -> EnvironmentBuildError:
    """Return the error that names the instruction, what to do, and the end of the log."""
    text = "\n".join([*log.tail, said])
    code = _EXIT_CODE.search(said)
    hint = find_hint(text)
    what = said.strip() if code is None else f"it ended with exit code {code[1]}"
    if log.instruction is None:
        message = f"{named} can't be built: {hint or what}."
    else:
        cut = "…" if len(log.instruction) > _SHOWN_INSTRUCTION else ""
        instruction = f"{log.instruction[:_SHOWN_INSTRUCTION]}{cut}"
        message = f"{named} can't be built: {hint or what}. The instruction was: {instruction}"
    return EnvironmentBuildError(
        message,
        instruction=log.instruction,
        log_tail=tuple(log.tail),
        retryable=retryable or is_network_failure(text),
    )
