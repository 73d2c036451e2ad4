"""Volumes that a compute's workers share with its pods: what lies there is mounted where the step expects it.

Where the step's working directory lies there too, with everything else, the pod is nothing but the step: no file of
it is copied, and no container of ours is in it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlpipelines.compute.container_layout import (
    CODE,
    HOME,
    OUTPUTS,
    RUN,
    RUNTIME,
    input_target,
)
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, STEP, WORKSPACE
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_mlpipelines.compute.base import Stage, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

Json = dict[str, Any]
SHARED_OUTPUTS = "outputs"
SHARED_WORK = "work"


class _Place(NamedTuple):
    """A directory or file of a claim's volume."""

    claim: str
    path: str


class _Mount(NamedTuple):
    """What the step finds at ``target``."""

    place: _Place
    target: str
    read_only: bool = False


def mount_shared(spec: PodSpec, launch: StepLaunch, compute: KubernetesComputeSpec) -> PodSpec:
    """Return the pod with all that lies on shared volumes mounted into its step, and not copied.

    The directories that the step writes to are to be given to the user that it runs as: :func:`hand_over`.
    """
    mounts = dict(_find_mounts(launch, compute))
    if not mounts:
        return spec
    stage = launch.stage
    parts = {"code": stage.code, "run": stage.run, "runtime": stage.runtime}
    work = {name: _find_place(compute, path) for name, path in parts.items()}
    complete = (
        not launch.carriage
        and launch.nodes == 1  # each of several has a working directory of its own
        and len(mounts) == len(stage.inputs) + bool(stage.outputs)
        and None not in work.values()
    )
    if complete:
        targets = {"code": CODE, "run": RUN, "runtime": RUNTIME}
        for name, place in work.items():
            if place is not None:
                mounts[name] = _Mount(place, targets[name], read_only=name == "runtime")
    _lay_out(spec.manifest["spec"], list(mounts.values()), complete=complete, compute=compute)
    written = [stage.outputs_root] if SHARED_OUTPUTS in mounts else []
    written += [stage.code, stage.run] if complete else []
    names = {name for name in mounts if name not in parts}
    shared = frozenset(names | ({SHARED_WORK} if complete else set()))
    return replace(spec, shared=shared, written=tuple(written))


def hand_over(spec: PodSpec) -> None:
    """Give the directories on shared volumes that the step writes to, to the user that it runs as.

    Raises:
        DataError: This worker can't do that.
    """
    worker = os.getuid()
    if not spec.written or spec.uid in (worker, 0):
        return
    if worker != 0:
        raise DataError(
            f"its pod runs as user {spec.uid} (the compute's security_context), but this worker, as user {worker}, "
            "can't give it directories on a shared volume. Leave out runAsUser, or run the workers as that user."
        )
    for top in spec.written:
        for path in (top, *top.rglob("*")):
            os.chown(path, spec.uid, spec.gid, follow_symlinks=False)


def works_with_stage(stage: Stage, spec: PodSpec) -> bool:
    """Return whether some of the step's own directories on the worker are what its pod works with."""
    if SHARED_WORK in spec.shared:
        return True
    used = [path for name, path in stage.inputs.items() if f"inputs/{name}" in spec.shared]
    used += [stage.outputs_root] if SHARED_OUTPUTS in spec.shared else []
    return any(path.is_relative_to(stage.root) for path in used)


def has_helpers(pod: Mapping[str, Any]) -> bool:
    """Return whether files of the pod's step are copied: else it is the step alone."""
    return any(item["name"] == OUTPUTS_KEEPER for item in pod["spec"].get("containers") or ())


def writes_in_place(pod: Mapping[str, Any]) -> bool:
    """Return whether a container of the pod may write to a volume that others have as well."""
    return any("persistentVolumeClaim" in volume for volume in pod["spec"].get("volumes") or ())


def look_again(directory: Path) -> None:
    """Have a network file system tell what is in a directory by now, not what it was a moment ago."""
    if directory.is_dir():
        with os.scandir(directory) as entries:
            for _ in entries:
                pass


def _find_mounts(
    launch: StepLaunch, compute: KubernetesComputeSpec
) -> Iterator[tuple[str, _Mount]]:
    stage = launch.stage
    for name, path in stage.inputs.items():
        place = _find_place(compute, path)
        if place is not None:
            yield f"inputs/{name}", _Mount(place, input_target(name, path), read_only=True)
    place = _find_place(compute, stage.outputs_root)
    # What the pod's agent commits, it has to have at hand.
    if stage.outputs and place is not None and not launch.carriage.outputs:
        yield SHARED_OUTPUTS, _Mount(place, OUTPUTS)


def _find_place(compute: KubernetesComputeSpec, path: Path) -> _Place | None:
    """Return where a path of this worker is on a claim; None if it is on none."""
    # The longest first: a volume may be mounted inside another one.
    for directory, volume in sorted(compute.shared_volumes.items(), key=lambda it: -len(it[0])):
        if path.is_relative_to(directory):
            claim, _, root = volume.partition("/")
            inside = PurePosixPath(root, path.relative_to(directory))
            return _Place(claim, "" if inside == PurePosixPath() else str(inside))
    return None


def _lay_out(
    pod: Json, mounts: list[_Mount], *, complete: bool, compute: KubernetesComputeSpec
) -> None:
    """Change the manifest: the mounts into the step, and the helpers out if they have nothing to do."""
    claims = sorted({mount.place.claim for mount in mounts})
    names = {claim: f"mlp-shared-{number}" for number, claim in enumerate(claims)}
    pod["volumes"] = [
        *pod["volumes"],
        *(
            {"name": names[claim], "persistentVolumeClaim": {"claimName": claim}}
            for claim in claims
        ),
    ]
    step = next(item for item in pod["containers"] if item["name"] == STEP)
    ours = [_mount_entry(mount, names) for mount in mounts]
    taken = {entry["mountPath"] for entry in ours}
    kept = [entry for entry in step["volumeMounts"] if entry["mountPath"] not in taken]
    if complete:
        kept = [entry for entry in kept if entry["name"] != WORKSPACE]
        kept.append({"name": WORKSPACE, "mountPath": HOME})
        pod["containers"] = [item for item in pod["containers"] if item["name"] == STEP]
        pod["initContainers"] = []
    step["volumeMounts"] = [*kept, *ours]
    if "fsGroup" not in compute.security_context:
        # The kubelet would give all files of the volume to that group, one by one.
        pod["securityContext"].pop("fsGroup", None)


def _mount_entry(mount: _Mount, names: Mapping[str, str]) -> Json:
    entry: Json = {"name": names[mount.place.claim], "mountPath": mount.target}
    if mount.place.path:
        entry["subPath"] = mount.place.path
    if mount.read_only:
        entry["readOnly"] = True
    return entry
