"""What ended a step's pod, in words: the cause, the limit that was met, and the remedy.

A program that would fail in the same way again is not tried again. What the cluster has done to it is, and
the message says that the program is not to blame.
"""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._units import show_duration, show_size
from airflow_mlpipelines.compute.docker.failures import (
    COMMAND_NOT_EXECUTABLE,
    COMMAND_NOT_FOUND,
    signal_name,
)
from airflow_mlpipelines.compute.kubernetes.pod import SHM, STEP
from airflow_mlpipelines.compute.kubernetes.watch import (
    container_state,
    find_condition,
)
from airflow_mlpipelines.exceptions import StepFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.compute.kubernetes.watch import PodEnd
    from airflow_mlpipelines.exceptions import MLPipelinesError

_NO_PROGRAM = re.compile(
    r'exec: "(?P<program>.*?)": (?P<why>[^:]*)|executable file not found|no such file or directory',
    re.I,
)
# As the kubelet's eviction manager writes them. All else that it evicts for, it lacks itself.
_CONTAINER_LIMIT = re.compile(
    r'Container (?P<name>\S+) exceeded its local ephemeral storage limit "(?P<limit>[^"]*)"'
)
_POD_LIMIT = re.compile(r"exceeds the total limit of containers (?P<limit>\S+?)\.(?:\s|$)")
_VOLUME_LIMIT = re.compile(
    r'Usage of EmptyDir volume "(?P<name>[^"]*)" exceeds the limit "(?P<limit>[^"]*)"'
)
_BUS_ERROR = 128 + signal.SIGBUS
_SHM_FULL = re.compile(r"bus error|shared memory \(shm\)", re.I)
_SHM_DEFAULT = "64 MiB, the default of container runtimes"
_SHOWN = 600
_KILLED = frozenset({128 + signal.SIGKILL, 128 + signal.SIGTERM})
_NOT_TO_BLAME = "The program is not to blame; it can be tried again."


class PodLostError(StepFailedError):
    """The cluster has taken a step's pod away, or somebody has: the program can be launched again.

    Attributes:
        why: In a few words.
    """

    def __init__(self, step: str, message: str, *, why: str, log_tail: Sequence[str] = ()) -> None:
        self.why = why
        super().__init__(step, message, log_tail=log_tail)

    def at(self, where: str) -> PodLostError:
        """Return the same error, with where it happened before its message."""
        return PodLostError(
            self.step,
            f"{where}: {self.message}",
            why=f"{where}: {self.why}",
            log_tail=self.log_tail,
        )


def end_failure(step: str, end: PodEnd, spec: PodSpec, log_tail: Sequence[str]) -> MLPipelinesError:
    """Return what to raise for a step that did not end with exit code 0."""
    late = deadline_failure(step, end.pod, spec, log_tail)
    if late is not None:
        return late
    facts = end.step
    disrupted = bool(disruption(end.pod))
    if facts is None and not end.gone and not disrupted:
        return pod_failure(step, end.pod, spec, log_tail)
    if facts is None or disrupted or _went_with_its_pod(end, facts):
        return lost_pod(step, end.pod, before_start=False, log_tail=log_tail)
    code = int(facts.get("exitCode", 0))
    reason, said = facts.get("reason"), str(facts.get("message", ""))
    if reason == "OOMKilled":
        limit = find_memory_limit(end.pod, STEP)
        message, retryable = _out_of_memory(spec, limit), not limit
    elif reason in ("StartError", "ContainerCannotRun") or code in (
        COMMAND_NOT_FOUND,
        COMMAND_NOT_EXECUTABLE,
    ):
        message, retryable = _no_program(spec, code, said), False
    else:
        hint = _shared_memory_hint(end.pod, code, log_tail)
        message, retryable = f"exit code {code}{signal_name(code)}{hint}", True
    return StepFailedError(step, message, exit_code=code, log_tail=log_tail, retryable=retryable)


def lost_unseen(step: str, pod: Mapping[str, Any] | None) -> StepFailedError:
    """Return what to raise for a pod that is gone, of which ``pod`` is what was seen last."""
    began = pod is not None and container_state(pod, STEP)[0] != "waiting"
    return lost_pod(step, pod, before_start=not began)


def lost_pod(
    step: str,
    pod: Mapping[str, Any] | None,
    *,
    before_start: bool,
    log_tail: Sequence[str] = (),
) -> StepFailedError:
    """Return what to raise for a pod that was taken away, or has met a limit of its own; None is one that is gone."""
    when = "before it began" if before_start else "while it ran"
    why = disruption(pod) if pod is not None else ""
    limit = _disk_limit(why)
    if limit is not None:
        return StepFailedError(
            step,
            f"its pod was evicted because {limit}, or write less. The cluster says: {why[:_SHOWN].strip()}",
            log_tail=log_tail,
            retryable=False,
        )
    if why:
        message = f"the cluster took its pod away {when} ({why[:_SHOWN]}). {_NOT_TO_BLAME}"
        return PodLostError(step, message, why=why[:_SHOWN].strip(": "), log_tail=log_tail)
    message = f"its pod was deleted {when}, by somebody or by the cluster (a drained or lost node). {_NOT_TO_BLAME}"
    return PodLostError(step, message, why=f"deleted {when}", log_tail=log_tail)


def pod_failure(
    step: str, pod: Mapping[str, Any], spec: PodSpec, log_tail: Sequence[str]
) -> StepFailedError:
    """Return what to raise for a pod that has failed without its program."""
    status = pod.get("status", {})
    said = " ".join(str(status[key]) for key in ("reason", "message") if status.get(key))
    message = f"its pod {spec.name!r} ended without its program ({said or status.get('phase')}). {_NOT_TO_BLAME}"
    return PodLostError(step, message, why=said[:_SHOWN] or "it ended", log_tail=log_tail)


def deadline_failure(
    step: str, pod: Mapping[str, Any], spec: PodSpec, log_tail: Sequence[str]
) -> StepFailedError | None:
    """Return what to raise for a pod that the cluster has ended because its time was up; None for any other."""
    if pod.get("status", {}).get("reason") != "DeadlineExceeded":
        return None
    seconds = spec.manifest["spec"].get("activeDeadlineSeconds")
    allowed = f"longer than {show_duration(seconds)}" if seconds else "too long"
    return StepFailedError(
        step,
        f"the cluster ended its pod, which was there for {allowed} (activeDeadlineSeconds: the step's timeout and "
        "what its start may take, or what the compute's pod_template_file says). Allow more time, or make it need less.",
        log_tail=log_tail,
    )


def disruption(pod: Mapping[str, Any]) -> str:
    """Return why the cluster took the pod away, in its words, or an empty string."""
    status = pod.get("status", {})
    condition = find_condition(pod, "DisruptionTarget")
    if condition.get("status") == "True":
        return f"{condition.get('reason')}: {condition.get('message')}"
    if status.get("reason") in (
        "Evicted",
        "Preempting",
        "NodeLost",
        "Shutdown",
        "NodeShutdown",
        "Terminated",
    ):
        return f"{status['reason']}: {status.get('message', '')}"
    return ""


def find_memory_limit(pod: Mapping[str, Any], name: str) -> str:
    """Return the memory limit of a container, whoever has set it, for people; empty if it has none."""
    from kubernetes.utils.quantity import parse_quantity

    spec = pod.get("spec", {})
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        limit = (container.get("resources") or {}).get("limits", {}).get("memory")
        if container["name"] == name and limit:
            return show_size(float(parse_quantity(limit)))
    return ""


def _went_with_its_pod(end: PodEnd, facts: Mapping[str, Any]) -> bool:
    """Return whether it was the end of the pod that ended the program, not the other way round."""
    if facts.get("reason") == "ContainerStatusUnknown":
        return True
    killed = facts.get("exitCode") in _KILLED and facts.get("reason") != "OOMKilled"
    return end.gone and killed


def _no_program(spec: PodSpec, code: int, said: str) -> str:
    match = _NO_PROGRAM.search(said)
    if match is None and code in (COMMAND_NOT_FOUND, COMMAND_NOT_EXECUTABLE):
        return (
            f"exit code {code}: a command that it called is not in the image {spec.image_name!r}, or can't be "
            "executed"
        )
    return (
        f"the program {spec.argv[0]!r} can't be started in the image {spec.image_name!r} ({said[:_SHOWN]}). "
        "Install it there, or name one that is."
    )


def _out_of_memory(spec: PodSpec, limit: str) -> str:
    if not limit:
        return (
            "killed because the node ran out of memory (the step has no limit). Give it one with memory=, so "
            "that the scheduler looks for a node with as much."
        )
    if spec.memory is None:
        return (
            f"killed because it needed more than its memory limit of {limit}, which is not the step's own: the "
            "namespace's LimitRange or the compute's pod_template_file sets it. Give the step or its compute memory= "
            "(more than that), or make it need less."
        )
    return (
        f"killed because it needed more than its memory limit of {limit}. Raise memory= of the step or of its "
        f"compute (such as {show_size(2 * spec.memory)}), or make it need less."
    )


def _disk_limit(why: str) -> str | None:
    """Return which limit of its own a pod that was evicted has met, and what to raise; None if it met none."""
    container = _CONTAINER_LIMIT.search(why)
    if container is not None:
        whose = (
            "it wrote"
            if container["name"] == STEP
            else f"its container {container['name']!r} wrote"
        )
        return (
            f"{whose} more to disk than its limit of {container['limit']}. Raise the compute's ephemeral_storage (or "
            "the default that the namespace's LimitRange sets)"
        )
    pod = _POD_LIMIT.search(why)
    if pod is not None:
        return (
            f"its containers, with their files and outputs, wrote more to disk than the limit of {pod['limit']} that "
            "they have together. Raise the compute's ephemeral_storage"
        )
    volume = _VOLUME_LIMIT.search(why)
    if volume is None:
        return None
    if volume["name"] == SHM:
        return f"it put more into /dev/shm than its {volume['limit']}. Raise shm_size"
    return (
        f"it put more into the volume {volume['name']!r} than its sizeLimit of {volume['limit']}. Raise that in the "
        "compute's pod_template_file"
    )


def _shared_memory_hint(pod: Mapping[str, Any], code: int, log_tail: Sequence[str]) -> str:
    """Return what may be too small for a program that touched shared memory which was not there."""
    if code != _BUS_ERROR and not any(_SHM_FULL.search(line) for line in log_tail):
        return ""
    from kubernetes.utils.quantity import parse_quantity

    size = _SHM_DEFAULT
    for volume in pod.get("spec", {}).get("volumes") or ():
        if volume["name"] == SHM and volume.get("emptyDir", {}).get("sizeLimit"):
            size = show_size(float(parse_quantity(volume["emptyDir"]["sizeLimit"])))
    return f". Was its shared memory full (/dev/shm has {size})? Then raise shm_size= of the step or of its compute"
