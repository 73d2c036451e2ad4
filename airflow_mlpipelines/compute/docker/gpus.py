"""GPUs for containers: how a daemon is asked for them, and what it says of itself beforehand.

Docker has no list of its GPUs. Of those that are asked for by the names of the Container Device Interface
(CDI), a daemon says whether it has them. Of others it says too little: one that lists the runtime
``nvidia`` has some, but one that does not may have NVIDIA's hook, which no question to it reveals, and
works as well. So there its own refusal to start the container is what counts. It comes before any program
in the container has begun (:mod:`airflow_mlpipelines.compute.docker.failures` puts it into words).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import list_options
from airflow_mlpipelines.exceptions import StepFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.compute.docker.container import ContainerSpec

_CDI = "cdi"


def device_requests(spec: ContainerSpec) -> list[dict[str, Any]]:
    """Return the GPUs of ``spec`` as Docker's API wants them: by id where they have some, else by number."""
    named = [name for name in spec.gpu_ids if _is_cdi_name(name)]
    others = [name for name in spec.gpu_ids if not _is_cdi_name(name)]
    requests: list[dict[str, Any]] = []
    if named:
        requests.append({"Driver": _CDI, "DeviceIDs": named})
    if others:
        requests.append({"DeviceIDs": others, "Capabilities": [["gpu"]]})
    if spec.gpus and not spec.gpu_ids:
        requests.append({"Count": spec.gpus, "Capabilities": [["gpu"]]})
    return requests


def check_gpus(step: str, info: Mapping[str, Any], spec: ContainerSpec, daemon: str) -> None:
    """Return, unless what the daemon says of itself rules out that it can start ``spec`` with its GPUs.

    Args:
        step: The step's name.
        info: The daemon's answer to ``/info``.
        spec: What will be asked of it.
        daemon: Where it listens.

    Raises:
        StepFailedError: A GPU that is asked for by its CDI name is not there.
    """
    named = [name for name in spec.gpu_ids if _is_cdi_name(name)]
    if not named:
        return
    found = info.get("DiscoveredDevices")
    if found is None:  # before Docker 28.2 a daemon says only where it would look
        if info.get("CDISpecDirs"):
            return
        why = "does not use the Container Device Interface (CDI)"
    else:
        offered = _cdi_devices(found)
        lacking = [name for name in named if name not in offered]
        if not lacking:
            return
        named = lacking
        why = f"has {list_options(offered)}" if offered else "has found no devices"
    raise StepFailedError(
        step,
        f"it asks for the GPUs {list_options(named)}, but the Docker daemon at {daemon} {why}. Make the host's "
        "CDI files (nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml) and enable CDI in the daemon, or "
        "name other GPUs in the compute's 'gpus'.",
        retryable=False,
    )


def _cdi_devices(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(device["ID"]) for device in found if device.get("Source") == _CDI]


def _is_cdi_name(name: str) -> bool:
    return "/" in name and "=" in name
