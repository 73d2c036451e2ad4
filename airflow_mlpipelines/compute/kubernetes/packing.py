"""Small files of a step in its pod's Secret: the pod unpacks them by itself, and no worker has to wait for it."""

from __future__ import annotations

import gzip
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.archive import (
    entry_size,
    iter_entries,
    write_archive,
)
from airflow_mlpipelines.compute.kubernetes.lifetime import has_files
from airflow_mlpipelines.compute.kubernetes.pod import STAGE, mount_document, secret_bytes
from airflow_mlpipelines.compute.kubernetes.scripts import SHELL, UNPACK
from airflow_mlpipelines.compute.kubernetes.volumes import has_helpers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.compute.base import Stage
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec

PACKED_NAME = "files.tar.gz"
LARGEST = 256 << 10
"""Bytes, compressed. A Secret holds 1 MiB, but every one lies in the cluster's database as long as its pod."""
_LARGEST_ARCHIVE = 2 << 20
_LARGEST_SECRET = 960 << 10
_VOLUME = "mlp-files"
_DIRECTORY = "/mlp-files"


def pack_files(spec: PodSpec, stage: Stage) -> PodSpec:
    """Return the pod with its step's files in its Secret, if they are small; else as it is.

    Raises:
        CommandError: There is something that is neither a file nor a directory.
    """
    if not has_helpers(spec.manifest):
        return spec
    entries, size = [], 0
    for entry in iter_entries(stage, spec):  # of a million files, only the first are looked at
        size += entry_size(entry)
        if size > _LARGEST_ARCHIVE:
            return spec
        entries.append(entry)
    packed = gzip.compress(b"".join(write_archive(entries)), mtime=0)
    others = (*spec.secrets.values(), *spec.documents.values())
    whole = len(packed) + sum(len(secret_bytes(value)) for value in others)
    if len(packed) > LARGEST or whole > _LARGEST_SECRET:
        return spec
    _mount(spec)
    return replace(spec, documents={**spec.documents, PACKED_NAME: packed})


def is_packed(pod: Mapping[str, Any]) -> bool:
    """Return whether the pod finds its step's files in its Secret."""
    return any(volume["name"] == _VOLUME for volume in pod["spec"].get("volumes") or ())


def awaits_files(pod: Mapping[str, Any]) -> bool:
    """Return whether a worker has to send the step's files before it can begin.

    One that finds them in its Secret may begin at any moment: nothing that it works with is to be made anew.
    """
    return not (has_files(pod) or is_packed(pod))


def _mount(spec: PodSpec) -> None:
    init_containers = spec.manifest["spec"]["initContainers"]
    stage = next(item for item in init_containers if item["name"] == STAGE)
    mount_document(spec, PACKED_NAME, volume=_VOLUME, directory=_DIRECTORY, containers=(stage,))
    file = f"{_DIRECTORY}/{PACKED_NAME}"
    if stage["command"][0] == SHELL:
        stage["command"] = [SHELL, "-c", UNPACK, SHELL, file]
        stage["terminationMessagePolicy"] = "FallbackToLogsOnError"
    else:
        stage["command"] = [*stage["command"], file]
