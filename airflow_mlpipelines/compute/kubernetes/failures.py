"""What went wrong with a pod, in words: the cause, the limit that was met, and the remedy.

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
from airflow_mlpipelines.compute.kubernetes.agent import staging_failure
from airflow_mlpipelines.compute.kubernetes.cluster import (
    FORBIDDEN,
    NOT_FOUND,
    UNAUTHORIZED,
    UNREACHABLE,
)
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.watch import (
    container_state,
    find_condition,
    is_leaving,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster, ClusterError
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.compute.kubernetes.watch import PodEnd, StartTimeoutError
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
    from airflow_mlpipelines.exceptions import MLPipelinesError

_NEVER_PULLED = frozenset({"InvalidImageName", "ErrImageNeverPull"})
_NOT_PULLED = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"})
_NOT_MADE = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_ABSENT = re.compile(
    r"not found|does not exist|manifest unknown|denied|unauthorized|forbidden|no basic auth|401|403",
    re.I,
)
_NO_PROGRAM = re.compile(
    r'exec: "(?P<program>.*?)": (?P<why>[^:]*)|executable file not found|no such file or directory',
    re.I,
)
_NO_CLAIM = re.compile(r'persistentvolumeclaim "(?P<claim>[^"]*)" not found')
_CLAIM_SECONDS = 20.0
_PATIENCE_SECONDS = 120.0
"""How long something that may heal by itself, such as a registry that is away, may take."""
_CREDENTIALS_SECONDS = 20.0
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


def is_hopeless(pod: Mapping[str, Any], waited: float) -> bool:
    """Return whether a container of the pod, which waits for so many seconds, will never start."""
    if waited > _CLAIM_SECONDS and _missing_claim(pod) is not None:
        return True
    for name in (STAGE, OUTPUTS_KEEPER, STEP):
        state, facts = container_state(pod, name)
        reason = facts.get("reason")
        if state == "terminated" and name == STAGE and facts.get("exitCode") != 0:
            return True
        if state != "waiting" or reason is None:
            continue
        if reason in _NEVER_PULLED:
            return True
        if reason in _NOT_PULLED:
            is_final = _ABSENT.search(facts.get("message", "")) is not None
            patience = _pull_patience(pod) if is_final else _PATIENCE_SECONDS
            if waited > patience:
                return True
        if reason in _NOT_MADE and waited > _PATIENCE_SECONDS / 4:
            return True
    return False


def _pull_patience(pod: Mapping[str, Any]) -> float:
    """Return for how long a pull that was refused may be tried: its credentials may come a moment after the pod."""
    pod_name = str(pod["metadata"]["name"])
    secrets = pod.get("spec", {}).get("imagePullSecrets") or ()
    own = any(pod_name.startswith(str(secret.get("name"))) for secret in secrets)
    return _CREDENTIALS_SECONDS if own else -1.0


def refusal(
    step: str, error: ClusterError, compute: KubernetesComputeSpec, cluster: Cluster
) -> MLPipelinesError:
    """Return what to raise when the API server does not do what it is asked for."""
    said = str(error)[:_SHOWN]
    where = f"compute {compute.name!r}: the cluster at {cluster.url}"
    if error.status == UNREACHABLE:
        return ComputeUnavailableError(
            f"{where} does not answer: {said}. Check its address, and this worker's way to it."
        )
    if error.status == UNAUTHORIZED:
        return ComputeUnavailableError(
            f"{where} does not take this worker's credentials (401: {said}). The token has expired, or was "
            "never valid: renew it in the Airflow connection, the kubeconfig or the service account."
        )
    if error.status == FORBIDDEN:
        return _forbidden(step, said, compute)
    if error.status == NOT_FOUND and "namespaces" in said:
        return StepFailedError(
            step,
            f"the cluster has no namespace {compute.namespace!r}, which compute {compute.name!r} names. "
            f"Create it (kubectl create namespace {compute.namespace}), or correct namespace=.",
            retryable=False,
        )
    if error.may_pass:
        return ComputeUnavailableError(f"{where} is not well ({error.status}): {said}")
    return StepFailedError(
        step, f"the cluster refused its pod ({error.status}): {said}", retryable=False
    )


def start_failure(
    step: str, pod: Mapping[str, Any] | None, spec: PodSpec, compute: KubernetesComputeSpec
) -> MLPipelinesError:
    """Return what to raise for a pod that was over, or hopeless, before its step began."""
    if pod is None or is_leaving(pod) or _disruption(pod):
        return _lost(step, pod, before_start=True)
    claim = _missing_claim(pod)
    if claim is not None:
        return StepFailedError(
            step,
            f"namespace {compute.namespace!r} has no PersistentVolumeClaim {claim!r}, which compute {compute.name!r} "
            "names in shared_volumes (or in its pod_template_file). Create it there, or correct the name.",
            retryable=False,
        )
    helper = compute.agent_image or compute.helper_image
    for name, image in ((STAGE, helper), (OUTPUTS_KEEPER, helper), (STEP, spec.image_name)):
        state, facts = container_state(pod, name)
        reason, said = str(facts.get("reason", "")), str(facts.get("message", ""))[:_SHOWN]
        if state == "waiting" and reason in _NEVER_PULLED | _NOT_PULLED:
            return _no_image(step, image, reason, said, compute, is_helper=name != STEP)
        if state == "waiting" and reason in _NOT_MADE:
            return StepFailedError(
                step,
                f"its container {name!r} can't be made ({reason}): {said}. Check the compute's "
                "security_context, pod_template_file and what they refer to.",
                retryable=False,
            )
        if state == "terminated" and name == STAGE and facts.get("exitCode") != 0:
            return staging_failure(facts) or _not_staged(step, facts, compute)
    return _pod_failed(step, pod, spec, ())


def timeout_failure(
    step: str, timeout: StartTimeoutError, spec: PodSpec, compute: KubernetesComputeSpec
) -> MLPipelinesError:
    """Return what to raise for a pod that did not start in the time that its compute allows."""
    if not timeout.scheduled:
        said = find_condition(timeout.pod, "PodScheduled").get(
            "message", "the scheduler says nothing"
        )
        return ComputeUnavailableError(
            f"step {step!r}: no node of compute {compute.name!r} took its pod within "
            f"{show_duration(compute.schedule_timeout_seconds)} (schedule_timeout_seconds): {said}. Ask for "
            "less (cpus, memory, gpus, gpu_type), check node_selector, tolerations and affinity, or wait "
            "longer for a free node."
        )
    waiting = [
        f"{name}: {facts.get('reason', state)} {str(facts.get('message', ''))[:_SHOWN]}".strip()
        for name, (state, facts) in (
            (name, container_state(timeout.pod, name)) for name in (STAGE, OUTPUTS_KEEPER, STEP)
        )
        if state == "waiting" and (facts or name == STEP)
    ]
    return ComputeUnavailableError(
        f"step {step!r}: its pod did not start within {show_duration(compute.startup_timeout_seconds)} "
        f"(startup_timeout_seconds; {'; '.join(waiting)}). Does the node pull the image {spec.image_name!r} "
        "that slowly? Then allow more time."
    )


def end_failure(step: str, end: PodEnd, spec: PodSpec, log_tail: Sequence[str]) -> MLPipelinesError:
    """Return what to raise for a step that did not end with exit code 0."""
    facts = end.step
    disrupted = bool(_disruption(end.pod))
    if facts is None and not end.gone and not disrupted:
        return _pod_failed(step, end.pod, spec, log_tail)
    if facts is None or disrupted or _went_with_its_pod(end, facts):
        return _lost(step, end.pod, before_start=False, log_tail=log_tail)
    code = int(facts.get("exitCode", 0))
    reason, said = facts.get("reason"), str(facts.get("message", ""))
    if reason == "OOMKilled":
        message, retryable = _out_of_memory(spec), spec.memory is None
    elif reason in ("StartError", "ContainerCannotRun") or code in (
        COMMAND_NOT_FOUND,
        COMMAND_NOT_EXECUTABLE,
    ):
        message, retryable = _no_program(spec, code, said), False
    else:
        message, retryable = f"exit code {code}{signal_name(code)}", True
    return StepFailedError(step, message, exit_code=code, log_tail=log_tail, retryable=retryable)


def _went_with_its_pod(end: PodEnd, facts: Mapping[str, Any]) -> bool:
    """Return whether it was the end of the pod that ended the program, not the other way round."""
    if facts.get("reason") == "ContainerStatusUnknown":
        return True
    killed = facts.get("exitCode") in _KILLED and facts.get("reason") != "OOMKilled"
    return end.gone and killed


def lost_unseen(step: str, pod: Mapping[str, Any] | None) -> StepFailedError:
    """Return what to raise for a pod that is gone, of which ``pod`` is what was seen last."""
    began = pod is not None and container_state(pod, STEP)[0] != "waiting"
    return _lost(step, pod, before_start=not began)


def _forbidden(step: str, said: str, compute: KubernetesComputeSpec) -> StepFailedError:
    if "exceeded quota" in said:
        return StepFailedError(
            step,
            f"the quota of namespace {compute.namespace!r} leaves no room for its pod: {said}. Wait until others "
            "have ended, ask for less, or have the quota raised.",
        )
    if "cannot" in said and "resource" in said:
        return StepFailedError(
            step,
            f"this worker may not do that in namespace {compute.namespace!r}: {said}. Its service account or user, "
            "and the triggerer's, need pods (create, get, list, watch, patch, delete), pods/log (get), pods/exec (create, "
            "get) and secrets (create, delete); for steps on several nodes also jobs of the API group batch (create, get, "
            "patch, delete), services (create, delete) and, for better errors, events (list). This project's "
            "deploy/helm/rbac.yaml grants these.",
            retryable=False,
        )
    return StepFailedError(
        step,
        f"the cluster's rules do not admit its pod: {said}. Change the compute (security_context, labels, "
        "service_account, pod_template_file), or have the rule changed.",
        retryable=False,
    )


def _no_image(
    step: str,
    image: str,
    reason: str,
    said: str,
    compute: KubernetesComputeSpec,
    *,
    is_helper: bool,
) -> MLPipelinesError:
    which = f"the image {image!r}" + (
        " of its helpers (helper_image, agent_image)" if is_helper else ""
    )
    if reason in _NOT_PULLED and not _ABSENT.search(said):
        return ComputeUnavailableError(
            f"step {step!r}: {which} can't be pulled on compute {compute.name!r} ({reason}): {said}. Check the "
            "nodes' way to the registry."
        )
    return StepFailedError(
        step,
        f"{which} can't be had on compute {compute.name!r} ({reason}): {said}. Check its name and tag, and the "
        "compute's image_conn_id or image_pull_secrets.",
        retryable=False,
    )


def _missing_claim(pod: Mapping[str, Any]) -> str | None:
    """Return the name of a claim that the scheduler looks for in vain."""
    said = str(find_condition(pod, "PodScheduled").get("message", ""))
    match = _NO_CLAIM.search(said)
    return match["claim"] if match is not None else None


def _not_staged(
    step: str, facts: Mapping[str, Any], compute: KubernetesComputeSpec
) -> StepFailedError:
    ended = f"the container {STAGE!r}, which takes the step's files, ended with exit code {facts.get('exitCode')}"
    if compute.agent_image is None:
        return StepFailedError(
            step,
            f"{ended}. Does its image {compute.helper_image!r} (the compute's helper_image) have sh and tar?",
        )
    said = " ".join(str(facts[key]) for key in ("reason", "message") if facts.get(key))[-_SHOWN:]
    return StepFailedError(
        step,
        f"{ended} ({said}). Is its image {compute.agent_image!r} (the compute's agent_image) built from "
        "images/agent/Dockerfile of the worker's release?",
    )


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


def _out_of_memory(spec: PodSpec) -> str:
    if spec.memory is None:
        return (
            "killed because the node ran out of memory (the step has no limit). Give it one with memory=, so "
            "that the scheduler looks for a node with as much."
        )
    return (
        f"killed because it needed more than its memory limit of {show_size(spec.memory)}. Raise memory= of the "
        f"step or of its compute (such as {show_size(2 * spec.memory)}), or make it need less."
    )


def _disruption(pod: Mapping[str, Any]) -> str:
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


def _lost(
    step: str,
    pod: Mapping[str, Any] | None,
    *,
    before_start: bool,
    log_tail: Sequence[str] = (),
) -> StepFailedError:
    when = "before it began" if before_start else "while it ran"
    why = _disruption(pod) if pod is not None else ""
    if "ephemeral" in why or "emptyDir" in why or "exceeds the total limit" in why:
        return StepFailedError(
            step,
            f"its pod was evicted because it wrote more to disk than it may: {why}. Raise the compute's "
            "ephemeral_storage, or write less.",
            log_tail=log_tail,
            retryable=False,
        )
    if why:
        message = f"the cluster took its pod away {when} ({why[:_SHOWN]}). {_NOT_TO_BLAME}"
        return PodLostError(step, message, why=why[:_SHOWN].strip(": "), log_tail=log_tail)
    message = f"its pod was deleted {when}, by somebody or by the cluster (a drained or lost node). {_NOT_TO_BLAME}"
    return PodLostError(step, message, why=f"deleted {when}", log_tail=log_tail)


def _pod_failed(
    step: str, pod: Mapping[str, Any], spec: PodSpec, log_tail: Sequence[str]
) -> StepFailedError:
    status = pod.get("status", {})
    said = " ".join(str(status[key]) for key in ("reason", "message") if status.get(key))
    message = f"its pod {spec.name!r} ended without its program ({said or status.get('phase')}). {_NOT_TO_BLAME}"
    if status.get("reason") == "DeadlineExceeded":
        return StepFailedError(step, message, log_tail=log_tail)
    return PodLostError(step, message, why=said[:_SHOWN] or "it ended", log_tail=log_tail)
