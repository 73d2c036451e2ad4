"""The pod of one step run: what is asked of the cluster, as the plain JSON that its API takes."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import (
    CODE,
    HOME_VARIABLES,
    LABEL_PREFIX,
    ROOT,
    STEP_RUN_LABEL,
    choose_shm_size,
)
from airflow_mlpipelines.compute.kubernetes.scripts import KEEP, SHELL, WAIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from airflow_mlpipelines.compute.base import StepLaunch
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

Json = dict[str, Any]
STEP = "step"
STAGE = "stage"
OUTPUTS_KEEPER = "outputs"
DOCKER_CONFIG = ".dockerconfigjson"
"""The document of a Secret that nodes log in at registries with, as Kubernetes calls it."""
OWNER = f"{LABEL_PREFIX}owner"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
DEFAULT_UID = 1000
"""Whom a step runs as where the worker is root, whom a pod should not be."""
WORKSPACE = "mlp-workspace"
SHM = "mlp-shm"
_SUB_PATHS = ("code", "run", "outputs", "home")
_READ_ONLY = ("runtime", "inputs")
_LONGEST_NAME = 63
_DIGEST_LENGTH = 10
_WORD_BYTES = 4
_UNSAFE_IN_NAME = re.compile(r"[^a-z0-9-]+")
_UNSAFE_IN_LABEL = re.compile(r"[^A-Za-z0-9_.-]+")
_OF_THE_POD = frozenset(
    {
        "appArmorProfile", "fsGroup", "fsGroupChangePolicy", "runAsGroup", "runAsNonRoot", "runAsUser",
        "seLinuxOptions", "seccompProfile", "supplementalGroups", "supplementalGroupsPolicy", "sysctls",
        "windowsOptions",
    }
)  # fmt: skip
# One of them idles beside the step for as long as that takes: what it asks for, no other pod can have.
_HELPER_RESOURCES = {
    "requests": {"cpu": "10m", "memory": "32Mi"},
    "limits": {"cpu": "1", "memory": "256Mi"},
}


@dataclass(frozen=True)
class PodSpec:
    """What is asked of the cluster for one step run.

    Attributes:
        image_name: The image as people call it.
        uid: Whom the step's files belong to in the pod.
        memory: Bytes.
        manifest: The pod, without what only this try knows.
        documents: Files of the pod's Secret that helpers mount, or that nodes read, by their names.
        word: Begins the keys of its Secret (:meth:`key_of`).
        shared: What the step has on volumes that the worker shares: ``inputs/<name>``, ``outputs``, and ``work`` for
            all that it works with. It is not copied.
        written: The directories on such volumes that the step writes to.
    """

    name: str
    step_run_id: str
    image_name: str
    argv: tuple[str, ...]
    uid: int
    gid: int
    memory: int | None
    gpus: int
    secrets: Mapping[str, str] = field(repr=False)
    manifest: Json = field(repr=False)
    documents: Mapping[str, str | bytes] = field(default_factory=dict, repr=False)
    shared: frozenset[str] = frozenset()
    written: tuple[Path, ...] = ()
    word: str = ""

    def key_of(self, name: str) -> str:
        """Return under which key the pod's Secret holds something.

        No two launches have the same: the Secret of an earlier one, which the cluster has not cleared away yet, has
        the same name, and nothing of it is taken for this one's.
        """
        # Nodes look for this one by its own name.
        return name if name == DOCKER_CONFIG else f"{self.word}-{name}"

    @property
    def needs_secret(self) -> bool:
        """Whether a Secret of its own belongs to the pod."""
        return bool(self.secrets or self.documents)


def pod_name(step_run_id: str) -> str:
    """Return the name of the pod (and of its Secret) of a step run: a DNS label, one for each id."""
    name = _UNSAFE_IN_NAME.sub("-", step_run_id.lower()).strip("-")
    if name == step_run_id and len(name) <= _LONGEST_NAME:
        return name
    kept = name[: _LONGEST_NAME - _DIGEST_LENGTH - 1].strip("-")
    return f"{kept or 'mlp'}-{_short_digest(step_run_id)}"


def label_value(text: str) -> str:
    """Return ``text`` as a label may have it; what is cut or replaced is told apart by a digest."""
    value = _UNSAFE_IN_LABEL.sub("_", text).strip("_.-")
    if value == text and len(value) <= _LONGEST_NAME:
        return value
    kept = value[: _LONGEST_NAME - _DIGEST_LENGTH - 1].strip("_.-")
    return f"{kept or 'x'}-{_short_digest(text)}"


def plan_pod(launch: StepLaunch, compute: KubernetesComputeSpec, *, image_name: str) -> PodSpec:
    """Return what to ask of the cluster for ``launch``; what the step leaves open, the compute says."""
    wanted = launch.resources
    memory = wanted.memory if wanted.memory is not None else compute.memory
    gpus = wanted.gpus or 0
    pod_security, container_security = _security(compute.security_context)
    uid = int(pod_security["runAsUser"])
    gid = int(pod_security.get("runAsGroup", uid))
    name = pod_name(launch.step_run_id)
    spec = PodSpec(
        name=name,
        step_run_id=launch.step_run_id,
        image_name=image_name,
        argv=launch.argv,
        uid=uid,
        gid=gid,
        memory=memory,
        gpus=gpus,
        secrets=launch.secrets,
        manifest={},
        word=secrets.token_hex(_WORD_BYTES),
    )
    shm_size = choose_shm_size(wanted, default=compute.shm_size, gpus=gpus, memory=memory)
    mounts: list[Json] = [
        {"name": WORKSPACE, "mountPath": f"{ROOT}/{part}", "subPath": part} for part in _SUB_PATHS
    ]
    mounts += [
        {"name": WORKSPACE, "mountPath": f"{ROOT}/{part}", "subPath": part, "readOnly": True}
        for part in _READ_ONLY
    ]
    volumes: list[Json] = [{"name": WORKSPACE, "emptyDir": {}}]
    if shm_size is not None:
        volumes.append({"name": SHM, "emptyDir": {"medium": "Memory", "sizeLimit": str(shm_size)}})
        mounts.append({"name": SHM, "mountPath": "/dev/shm"})  # noqa: S108 - where it has to be
    step: Json = {
        "name": STEP,
        "image": launch.image or image_name,
        "command": [_literal(argument) for argument in launch.argv],
        "args": [],  # an image's own arguments may not come after what the step declares
        "workingDir": CODE,
        "env": _variables(launch, spec),
        "resources": _resources(launch, compute, memory=memory, gpus=gpus),
        "volumeMounts": mounts,
        "securityContext": container_security,
    }
    labels = {f"{LABEL_PREFIX}{key}": label_value(value) for key, value in launch.labels.items()}
    labels |= {key: label_value(value) for key, value in compute.labels.items()}
    labels[STEP_RUN_LABEL] = label_value(launch.step_run_id)
    if compute.queue is not None:
        labels[QUEUE_LABEL] = compute.queue
    exact = {f"{LABEL_PREFIX}{key}": value for key, value in launch.labels.items()}
    manifest: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": {**exact, **compute.annotations},
        },
        "spec": {
            "restartPolicy": "Never",
            "enableServiceLinks": False,
            "initContainers": [_helper(STAGE, WAIT, compute, container_security)],
            "containers": [
                # First, so that what the step leaves behind can be fetched whenever it ends.
                _helper(OUTPUTS_KEEPER, KEEP, compute, container_security),
                step,
            ],
            "volumes": volumes,
            "securityContext": pod_security,
            **_placement(compute, wanted.gpu_type if gpus else None),
        },
    }
    if launch.timeout_seconds is not None:
        # Should no worker be there to end it, the cluster does.
        manifest["spec"]["activeDeadlineSeconds"] = int(
            launch.timeout_seconds
            + 2 * (compute.startup_timeout_seconds + compute.schedule_timeout_seconds)
        )
    return replace(spec, manifest=manifest)


def secret_manifest(spec: PodSpec, owner: Mapping[str, Any]) -> Json:
    """Return the Secret with the step's secrets. It belongs to the pod or the Job: the cluster removes both."""
    values: dict[str, str | bytes] = {
        **{str(number): value for number, value in enumerate(spec.secrets.values())},
        **spec.documents,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        # Nodes read no Secret of another type.
        "type": "kubernetes.io/dockerconfigjson" if DOCKER_CONFIG in values else "Opaque",
        "metadata": {
            "name": spec.name,
            "labels": spec.manifest["metadata"]["labels"],
            "ownerReferences": [owner_reference(owner)],
        },
        "data": {
            spec.key_of(name): base64.b64encode(secret_bytes(value)).decode()
            for name, value in values.items()
        },
    }


def secret_bytes(value: str | bytes) -> bytes:
    """Return what a Secret holds for a value."""
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def mount_document(
    spec: PodSpec, name: str, *, volume: str, directory: str, containers: Iterable[Json]
) -> None:
    """Mount one document of the pod's Secret, read-only and alone, in some of the pod's containers."""
    manifest = spec.manifest["spec"]
    source = {"secretName": spec.name, "items": [{"key": spec.key_of(name), "path": name}]}
    manifest["volumes"] = [*manifest["volumes"], {"name": volume, "secret": source}]
    mount = {"name": volume, "mountPath": directory, "readOnly": True}
    for container in containers:
        container["volumeMounts"] = [*container["volumeMounts"], mount]


def owner_reference(owner: Mapping[str, Any]) -> Json:
    """Return what makes an object go with its owner, a pod or a Job as the cluster has it."""
    meta = owner["metadata"]
    version, kind = owner.get("apiVersion", "v1"), owner.get("kind", "Pod")
    return {"apiVersion": version, "kind": kind, "name": meta["name"], "uid": meta["uid"]}


def _variables(launch: StepLaunch, spec: PodSpec) -> list[Json]:
    env = dict(launch.env)
    if spec.uid and "HOME" not in env:
        env = {**HOME_VARIABLES, **env}
    variables: list[Json] = [
        {"name": name, "value": _literal(value)}
        for name, value in env.items()
        if name not in launch.secrets
    ]
    for number, name in enumerate(launch.secrets):
        reference = {"name": spec.name, "key": spec.key_of(str(number))}
        variables.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return variables


def _literal(text: str) -> str:
    """Return ``text`` so that the kubelet, which replaces ``$(NAME)``, hands it on as it is."""
    return text.replace("$", "$$")


def _resources(
    launch: StepLaunch, compute: KubernetesComputeSpec, *, memory: int | None, gpus: int
) -> Json:
    cpus = launch.resources.cpus if launch.resources.cpus is not None else compute.cpus
    amounts: dict[str, str] = {}
    if cpus is not None:
        amounts["cpu"] = f"{round(cpus * 1000)}m"
    if memory is not None:
        amounts["memory"] = str(memory)
    if compute.ephemeral_storage is not None:
        amounts["ephemeral-storage"] = str(compute.ephemeral_storage)
    if gpus:
        amounts[compute.gpu_resource] = str(gpus)
    return {"requests": amounts, "limits": amounts} if amounts else {}


def _security(wanted: Mapping[str, Any]) -> tuple[Json, Json]:
    """Return the security contexts of the pod and of its containers: by default, nobody's but a user's.

    The default is what the Pod Security Standard "restricted" asks for. Whoever asks for root gets
    root as the image knows it.
    """
    uid = int(wanted.get("runAsUser", os.getuid() or DEFAULT_UID))
    pod: Json = {"runAsUser": uid, "runAsNonRoot": uid != 0}
    container: Json = {}
    if uid:
        gid = int(wanted.get("runAsGroup", os.getgid() or DEFAULT_UID))
        pod |= {"runAsGroup": gid, "fsGroup": gid}
        container = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    pod["seccompProfile"] = {"type": "RuntimeDefault"}
    for name, value in wanted.items():
        (pod if name in _OF_THE_POD else container)[name] = value
    return pod, container


def _placement(compute: KubernetesComputeSpec, gpu_type: str | None) -> Json:
    """Return the fields that say where the pod may run, and as whom towards the cluster."""
    selector = dict(compute.node_selector)
    if gpu_type is not None:
        selector[compute.gpu_type_label or f"{compute.gpu_resource}.product"] = gpu_type
    fields: Json = {
        "serviceAccountName": compute.service_account,
        "imagePullSecrets": [{"name": name} for name in compute.image_pull_secrets],
        "nodeSelector": selector,
        "tolerations": list(compute.tolerations),
        "affinity": dict(compute.affinity),
        "priorityClassName": compute.priority_class,
        "runtimeClassName": compute.runtime_class,
    }
    return {name: value for name, value in fields.items() if value}


def _helper(
    name: str, script: str, compute: KubernetesComputeSpec, security: Mapping[str, Any]
) -> Json:
    return {
        "name": name,
        "image": compute.helper_image,
        "command": [SHELL, "-c", script],
        "workingDir": ROOT,
        "resources": _HELPER_RESOURCES,
        "volumeMounts": [{"name": WORKSPACE, "mountPath": ROOT}],
        "securityContext": dict(security),
    }


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGEST_LENGTH]
