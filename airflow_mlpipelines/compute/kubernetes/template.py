"""The compute's pod template: a manifest of the team's own, which a step's pod is laid over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from airflow_mlpipelines.compute.kubernetes.pod import STEP
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

Json = dict[str, Any]
BASE = "base"
"""What Airflow's own pod templates call the container that does the work: here, the step's."""
_KEYS = {"volumeMounts": "mountPath"}
_BY_NAME = frozenset(
    {"containers", "initContainers", "volumes", "env", "volumeMounts", "imagePullSecrets"}
)


def read_template(file: str) -> Json:
    """Return the manifest in ``file`` on this worker.

    Raises:
        DataError: There is none, or it is no Pod.
    """
    path = Path(file).expanduser()
    try:
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"its compute's pod_template_file can't be read: {error}") from error
    if not isinstance(template, dict) or template.get("kind") != "Pod":
        raise DataError(f"its compute's pod_template_file {file!r} holds no manifest of kind Pod")
    for container in template.get("spec", {}).get("containers") or ():
        if container.get("name") == BASE:
            container["name"] = STEP
    return template


def lay_over(template: Mapping[str, Any], pod: Mapping[str, Any]) -> Json:
    """Return ``pod`` with all that only ``template`` says; where both say something, ``pod`` does.

    Containers, volumes, variables and mounts are matched by their names (mounts by their paths), other
    lists are put one behind the other.
    """
    merged: Json = dict(template)
    for name, value in pod.items():
        there = merged.get(name)
        if isinstance(there, dict) and isinstance(value, dict):
            merged[name] = lay_over(there, value)
        elif isinstance(there, list) and isinstance(value, list):
            merged[name] = _join(name, there, value)
        elif value is not None:
            merged[name] = value
    return merged


def _join(name: str, template: list[Any], pod: list[Any]) -> list[Any]:
    if name in ("command", "args"):
        return pod
    if name not in _BY_NAME:
        return [*template, *(item for item in pod if item not in template)]
    key = _KEYS.get(name, "name")
    known = {item[key]: item for item in template}
    ours = [lay_over(known.pop(item[key], {}), item) for item in pod]
    # Init containers of the template first: what they prepare may be needed by ours.
    return [*known.values(), *ours] if name == "initContainers" else [*ours, *known.values()]
