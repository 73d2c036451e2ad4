"""Why a pod does not start: what will never pass, what may pass if it gets some time, and both in words."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._units import show_duration
from airflow_mlpipelines.compute.kubernetes.agent import staging_failure
from airflow_mlpipelines.compute.kubernetes.events import read_warnings
from airflow_mlpipelines.compute.kubernetes.failures import (
    deadline_failure,
    disruption,
    find_memory_limit,
    lost_pod,
    pod_failure,
)
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.scripts import KEPT_MINUTES, NO_CONTACT
from airflow_mlpipelines.compute.kubernetes.watch import (
    container_state,
    find_condition,
    is_leaving,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.compute.kubernetes.watch import StartTimeoutError
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
    from airflow_mlpipelines.exceptions import MLPipelinesError

_NEVER_PULLED = frozenset({"InvalidImageName", "ErrImageNeverPull"})
_NOT_PULLED = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"})
_BAD_CONFIG = "CreateContainerConfigError"
_NOT_MADE = frozenset({"CreateContainerError", "RunContainerError"})
_REFERENCES = re.compile(r'"[^"\s]*"|https?://\S+|sha256:[0-9a-f]+')
"""What may hold any word or number without meaning it: names, addresses and digests."""
_ABSENT = re.compile(
    r"not found|does not exist|manifest unknown|denied|unauthorized|forbidden|no basic auth"
    r"|status(?:\s?code)?:?\s*40[134]\b",
    re.I,
)
_NOT_READ = re.compile(r"failed to sync|timed out", re.I)
"""A kubelet that has not got at a ConfigMap or a Secret yet, which may be there."""
_NO_CLAIM = re.compile(r'persistentvolumeclaim "(?P<claim>[^"]*)" not found')
_CLAIM_SECONDS = 20.0
_SHOWN = 600
_SHOWN_WARNINGS = 2
_BEFORE_NODE = frozenset({"FailedScheduling"})


class Trouble(Enum):
    """What keeps a container from starting; each with the seconds that it gets to pass by itself."""

    NO_IMAGE = 0.0
    NO_REGISTRY = 120.0
    """Or as long as the image had been pulled for before, if that is longer."""
    NOT_ADMITTED = 20.0
    """A registry refuses, and the pod's own credentials for it may come a moment after the pod."""
    BAD_CONFIG = 30.0
    NOT_MADE = 300.0
    """Mostly a container runtime that is busy, such as one that unpacks an image ("name is reserved")."""


@dataclass
class _Sighting:
    trouble: Trouble
    since: float
    waited: float


class StartErrors:
    """What has kept containers from starting, and since when: the memory of whoever watches their pods."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, str], _Sighting] = {}

    def is_hopeless(self, pod: Mapping[str, Any], waited: float) -> bool:
        """Return whether a container of the pod will never start.

        Args:
            pod: As it is now.
            waited: For how many seconds it has been waiting; infinite where somebody has given it up already.
        """
        if waited > _CLAIM_SECONDS and _missing_claim(pod) is not None:
            return True
        # All of them are looked at, so that what has passed is forgotten.
        final = [self._is_final(pod, name, waited) for name in (STAGE, OUTPUTS_KEEPER, STEP)]
        return any(final)

    def _is_final(self, pod: Mapping[str, Any], name: str, waited: float) -> bool:
        state, facts = container_state(pod, name)
        if state == "terminated" and name == STAGE and facts.get("exitCode") != 0:
            return True
        key = (str(pod["metadata"].get("uid")), name)
        trouble = find_trouble(pod, name)
        if trouble is None:
            self._seen.pop(key, None)
            return False
        now = self._clock()
        seen = self._seen.get(key)
        if seen is None or seen.trouble is not trouble:
            seen = self._seen[key] = _Sighting(trouble, now, waited)
        patience = trouble.value
        if trouble is Trouble.NO_REGISTRY:
            # A large image that was nearly there is pulled again, and its state says nothing of that.
            patience = max(patience, seen.waited)
        return math.isinf(waited) or now - seen.since >= patience


def find_trouble(pod: Mapping[str, Any], name: str) -> Trouble | None:
    """Return what keeps a container of the pod from starting; None if it only waits, or has started."""
    state, facts = container_state(pod, name)
    reason, said = str(facts.get("reason", "")), str(facts.get("message", ""))
    if state != "waiting":
        return None
    if reason in _NEVER_PULLED:
        return Trouble.NO_IMAGE
    if reason in _NOT_PULLED:
        if not _is_absent(said, _image(pod, name)):
            return Trouble.NO_REGISTRY
        return Trouble.NOT_ADMITTED if _has_own_credentials(pod) else Trouble.NO_IMAGE
    if reason == _BAD_CONFIG:
        return Trouble.NOT_MADE if _NOT_READ.search(said) else Trouble.BAD_CONFIG
    return Trouble.NOT_MADE if reason in _NOT_MADE else None


def start_failure(
    step: str, pod: Mapping[str, Any] | None, spec: PodSpec, compute: KubernetesComputeSpec
) -> MLPipelinesError:
    """Return what to raise for a pod that was over, or hopeless, before its step began."""
    if pod is None or is_leaving(pod) or disruption(pod):
        return lost_pod(step, pod, before_start=True)
    claim = _missing_claim(pod)
    if claim is not None:
        return StepFailedError(
            step,
            f"namespace {compute.namespace!r} has no PersistentVolumeClaim {claim!r}, which compute {compute.name!r} "
            "names in shared_volumes (or in its pod_template_file). Create it there, or correct the name.",
            retryable=False,
        )
    late = deadline_failure(step, pod, spec, ())
    if late is not None:
        return late
    helper = compute.agent_image or compute.helper_image
    for name, image in ((STAGE, helper), (OUTPUTS_KEEPER, helper), (STEP, spec.image_name)):
        state, facts = container_state(pod, name)
        if state == "terminated" and name == STAGE and facts.get("exitCode") != 0:
            return staging_failure(facts) or _not_staged(step, pod, facts, compute)
        trouble = find_trouble(pod, name)
        if trouble in (Trouble.NO_IMAGE, Trouble.NO_REGISTRY, Trouble.NOT_ADMITTED):
            return _no_image(step, image, facts, trouble, compute, is_helper=name != STEP)
        if trouble is not None:
            return _not_made(step, name, facts, trouble)
    return pod_failure(step, pod, spec, ())


def timeout_failure(
    step: str,
    timeout: StartTimeoutError,
    spec: PodSpec,
    compute: KubernetesComputeSpec,
    cluster: Cluster,
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
    warnings = read_warnings(cluster, timeout.pod, past=_BEFORE_NODE)[-_SHOWN_WARNINGS:]
    if warnings:
        hint = (
            f"The cluster warns: {'; '.join(warnings)}. Check what the compute's shared_volumes and pod_template_file "
            "refer to, and the node's way to volumes and to the registry."
        )
    else:
        hint = (
            f"Does the node pull the image {spec.image_name!r} that slowly? Then allow more time."
        )
    return ComputeUnavailableError(
        f"step {step!r}: its pod did not start within {show_duration(compute.startup_timeout_seconds)} "
        f"(startup_timeout_seconds; {'; '.join(waiting)}). {hint}"
    )


def _is_absent(said: str, image: str) -> bool:
    """Return whether a registry has said that it does not have the image, or not for us."""
    # The message repeats the image's name and digest, in which any word and number may be.
    said = said.replace(image, "") if image else said
    return _ABSENT.search(_REFERENCES.sub("", said)) is not None


def _has_own_credentials(pod: Mapping[str, Any]) -> bool:
    """Return whether the pod pulls with a Secret that was made for it, which has its name (a Job's adds to it)."""
    secrets = pod.get("spec", {}).get("imagePullSecrets") or ()
    name = str(pod["metadata"]["name"])
    return any(name.startswith(str(secret.get("name"))) for secret in secrets)


def _image(pod: Mapping[str, Any], name: str) -> str:
    spec = pod.get("spec", {})
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        if container["name"] == name:
            return str(container.get("image", ""))
    return ""


def _no_image(
    step: str,
    image: str,
    facts: Mapping[str, Any],
    trouble: Trouble,
    compute: KubernetesComputeSpec,
    *,
    is_helper: bool,
) -> MLPipelinesError:
    reason, said = facts.get("reason"), str(facts.get("message", ""))[:_SHOWN]
    which = f"the image {image!r}" + (
        " of its helpers (helper_image, agent_image)" if is_helper else ""
    )
    if trouble is Trouble.NO_REGISTRY:
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


def _not_made(step: str, name: str, facts: Mapping[str, Any], trouble: Trouble) -> MLPipelinesError:
    said = f"{facts.get('reason')}: {str(facts.get('message', ''))[:_SHOWN]}"
    if trouble is Trouble.BAD_CONFIG:
        return StepFailedError(
            step,
            f"its container {name!r} can't be made ({said}). Check the compute's security_context, pod_template_file "
            "and what they refer to.",
            retryable=False,
        )
    return ComputeUnavailableError(
        f"step {step!r}: the node could not make its container {name!r} for "
        f"{show_duration(Trouble.NOT_MADE.value)} ({said}). Is the node well? If it always says so, check the compute's "
        "security_context, pod_template_file and runtime_class."
    )


def _missing_claim(pod: Mapping[str, Any]) -> str | None:
    """Return the name of a claim that the scheduler looks for in vain."""
    said = str(find_condition(pod, "PodScheduled").get("message", ""))
    match = _NO_CLAIM.search(said)
    return match["claim"] if match is not None else None


def _not_staged(
    step: str, pod: Mapping[str, Any], facts: Mapping[str, Any], compute: KubernetesComputeSpec
) -> StepFailedError:
    code, who = facts.get("exitCode"), f"the container {STAGE!r}, which takes the step's files,"
    if facts.get("reason") == "OOMKilled":
        limit = find_memory_limit(pod, STAGE)
        return StepFailedError(
            step,
            f"{who} was killed for want of memory{limit and f' (its limit is {limit})'}. Can the node spare as much? "
            "A pod_template_file may give it more.",
        )
    if compute.agent_image is None and code == NO_CONTACT:
        return StepFailedError(
            step,
            f"{who} has waited for them for {KEPT_MINUTES // 60} hours, in which no worker came. Were there free "
            "workers? The step can be tried again.",
        )
    said = " ".join(str(facts[key]) for key in ("reason", "message") if facts.get(key))[-_SHOWN:]
    ended = f"{who} ended with exit code {code} ({said})"
    if compute.agent_image is None:
        return StepFailedError(
            step,
            f"{ended}. Does its image {compute.helper_image!r} (the compute's helper_image) have sh, tar and gzip?",
        )
    return StepFailedError(
        step,
        f"{ended}. Is its image {compute.agent_image!r} (the compute's agent_image) built from "
        "images/agent/Dockerfile of the worker's release?",
    )
