"""What went wrong with a container, in words: the cause, the limit that was met, and the remedy."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.docker.container import SHELL
from airflow_mlpipelines.compute.docker.gpus import is_refusal, no_gpu_runtime
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from docker.errors import APIError

    from airflow_mlpipelines.compute.docker.container import ContainerSpec
    from airflow_mlpipelines.compute.docker.watch import ContainerEnd
    from airflow_mlpipelines.exceptions import MLPipelinesError

COMMAND_NOT_EXECUTABLE = 126
COMMAND_NOT_FOUND = 127
_SIGNAL_BASE = 128
_LOST_WITH_DAEMON = frozenset({_SIGNAL_BASE + signal.SIGKILL, _SIGNAL_BASE + signal.SIGTERM, 255})
_SERVER_ERROR = 500
_CONFLICT = 409
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024
_OTHER_GPUS = re.compile(r"nvidia-container-cli: device error|unresolvable CDI devices", re.I)
_NO_PROGRAM = re.compile(r"\[FATAL tini .*\] exec (?P<program>.+) failed: (?P<why>.+)")
_NO_INIT = re.compile(r'exec: "?docker-init', re.I)
_NO_SOURCE = re.compile(r"bind source path does not exist: (?P<path>.+)|invalid mount config", re.I)


def start_failure(step: str, error: APIError, spec: ContainerSpec, daemon: str) -> MLPipelinesError:
    """Return what to raise when the daemon made no container of ``spec``, or did not start it."""
    said = str(error.explanation or error).strip()
    status = error.status_code or _SERVER_ERROR
    if is_refusal(error):
        return no_gpu_runtime(step, spec.gpus, daemon)
    if _OTHER_GPUS.search(said):
        asked = ", ".join(spec.gpu_ids) or str(spec.gpus)
        return StepFailedError(
            step,
            f"it asks for GPUs ({asked}) that the host of the Docker daemon at {daemon} does not have. Correct "
            f"the compute's 'gpus'. The daemon says: {said}",
            retryable=False,
        )
    if _NO_INIT.search(said):
        return ComputeUnavailableError(
            f"The Docker daemon at {daemon} lacks docker-init, which reaps a container's processes. "
            "Install it on that host (Debian: the package tini)."
        )
    if _NO_SOURCE.search(said):
        return StepFailedError(
            step,
            f"the Docker daemon at {daemon} does not see this worker's directories ({said}). Name one "
            "that lies at the same path on both in MLPIPELINES_WORK_DIR, and use a datastore that both see.",
            retryable=False,
        )
    if status == _CONFLICT:
        return ComputeUnavailableError(f"The name {spec.name!r} is taken on {daemon}: {said}")
    if status >= _SERVER_ERROR:
        return ComputeUnavailableError(
            f"The Docker daemon at {daemon} could not start step {step!r}: {said}"
        )
    return StepFailedError(
        step, f"the Docker daemon at {daemon} refused its container: {said}", retryable=False
    )


def end_failure(
    step: str, end: ContainerEnd, spec: ContainerSpec, daemon: str, log_tail: Sequence[str]
) -> MLPipelinesError:
    """Return what to raise for a container that did not end with exit code 0."""
    state = end.state
    if state is None:
        return StepFailedError(
            step, "somebody removed its container while it ran", log_tail=log_tail
        )
    code = int(state["ExitCode"])
    if end.daemon_was_away and code in _LOST_WITH_DAEMON:
        return ComputeUnavailableError(
            f"The Docker daemon at {daemon} went away, and step {step!r} with it (exit code {code})."
        )
    if state["OOMKilled"]:
        message, retryable = _out_of_memory(spec), spec.memory is None
    elif code in (COMMAND_NOT_FOUND, COMMAND_NOT_EXECUTABLE):
        message, retryable = f"exit code {code}: {_no_program(spec, log_tail)}", False
    else:
        message, retryable = f"exit code {code}{signal_name(code)}", True
    return StepFailedError(step, message, exit_code=code, log_tail=log_tail, retryable=retryable)


def format_bytes(count: int) -> str:
    """Return ``count`` as text in the largest binary unit that keeps it readable.

    Example:
        >>> format_bytes(1536 * 1024 * 1024)
        '1.5 GiB'
    """
    value, unit = float(count), 0
    while value >= _STEP and unit < len(_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    return f"{value:.4g} {_UNITS[unit]}"


def _no_program(spec: ContainerSpec, log_tail: Sequence[str]) -> str:
    said = _NO_PROGRAM.match(log_tail[-1]) if log_tail else None
    if said is None:
        return f"a command that it called is not in the image {spec.image_name!r}, or can't be executed"
    if spec.secrets and said["program"] == SHELL:
        return (
            f"it has secrets, and to hand them over the image {spec.image_name!r} needs {SHELL}. Take an image "
            "with a shell, or let the program fetch its secrets itself."
        )
    return (
        f"the program {said['program']!r} can't be started in the image {spec.image_name!r} ({said['why']}). "
        "Install it there, or name one that is."
    )


def _out_of_memory(spec: ContainerSpec) -> str:
    if spec.memory is None:
        return (
            "killed because the host ran out of memory (the step has no limit). Give it one with memory=, "
            "so that it can't take its neighbours', or run fewer steps on that host."
        )
    return (
        f"killed because it needed more than its memory limit of {format_bytes(spec.memory)}. Raise memory= "
        f"of the step or of its compute (such as {format_bytes(2 * spec.memory)}), or make it need less."
    )


def signal_name(code: int) -> str:
    """Return `` (killed by SIGSEGV)`` for an exit code that tells of a signal, else an empty string."""
    if not _SIGNAL_BASE < code < 2 * _SIGNAL_BASE:
        return ""
    try:
        return f" (killed by {signal.Signals(code - _SIGNAL_BASE).name})"
    except ValueError:
        return ""
