"""Volumes that the workers share with the pods of a compute: directory -> claim, as a user writes it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from airflow_mlpipelines.exceptions import DefinitionError

_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_EXAMPLE = "{'/mnt/ml': 'ml-data'}, or {'/mnt/ml': 'ml-data/team'} for a directory of the volume"


def parse_shared_volumes(where: str, value: Any) -> dict[str, str]:
    """Return the volumes by directory, both in their plain form.

    Args:
        where: What is being parsed, for errors.
        value: Each directory of the workers, and the claim that it is the root of, or ``claim/path``.

    Raises:
        DefinitionError: It is no such mapping, a directory is not absolute, or a claim is none.
    """
    if not isinstance(value, dict):
        raise DefinitionError(f"{where} is {value!r}; write {_EXAMPLE}")
    parsed: dict[str, str] = {}
    for directory, volume in value.items():
        path = _check_directory(where, directory)
        if path in parsed:
            raise DefinitionError(f"{where}: {path!r} is named twice")
        parsed[path] = _check_volume(where, path, volume)
    return parsed


def _check_directory(where: str, directory: Any) -> str:
    path = PurePosixPath(directory) if isinstance(directory, str) else PurePosixPath()
    if not path.is_absolute() or ".." in path.parts or path == PurePosixPath("/"):
        raise DefinitionError(
            f"{where}: {directory!r} has to be the absolute path of a directory, without '..', that the workers "
            f"and the volume have in common: {_EXAMPLE}"
        )
    return str(path)


def _check_volume(where: str, directory: str, volume: Any) -> str:
    claim, _, inside = volume.partition("/") if isinstance(volume, str) else ("", "", "")
    path = PurePosixPath(inside)
    if not _CLAIM.fullmatch(claim) or path.is_absolute() or ".." in path.parts:
        raise DefinitionError(
            f"{where}: {directory!r} is said to be {volume!r}, which is no PersistentVolumeClaim (lower-case letters, "
            f"digits, '-' and '.'), and no path inside one: {_EXAMPLE}"
        )
    return claim if path == PurePosixPath() else f"{claim}/{path}"
