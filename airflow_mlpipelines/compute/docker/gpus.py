"""GPUs for containers: how a daemon is asked for them, and whether it can hand any out.

Docker has no list of its GPUs. Of those that are asked for by the names of the Container Device Interface
(CDI), a daemon says whether it has them. Of others it says too little: one that lists the runtime
``nvidia`` has some, but one that does not may have NVIDIA's hook, which no question to it reveals, and
which works as well. That one is put to the test: it refuses to start a container with GPUs, whatever
is in it, before any program in it has begun.
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import list_options
from airflow_mlpipelines.compute.docker.daemon import daemon_url, remove_container
from airflow_mlpipelines.exceptions import StepFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from docker import APIClient
    from docker.errors import APIError

    from airflow_mlpipelines.definition.graph import DockerComputeSpec

_CDI = "cdi"
_PROBE = "mlp-gpu-probe"
_PROBE_PROGRAM = "true"
_NO_GPU = re.compile(
    r"could not select device driver|unknown or invalid runtime name: nvidia", re.I
)


def device_requests(count: int, ids: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the GPUs as Docker's API wants them: by id where they have some, else by number."""
    named, others = _by_name(ids)
    requests: list[dict[str, Any]] = []
    if named:
        requests.append({"Driver": _CDI, "DeviceIDs": named})
    if others:
        requests.append({"DeviceIDs": others, "Capabilities": [["gpu"]]})
    if count and not ids:
        requests.append({"Count": count, "Capabilities": [["gpu"]]})
    return requests


def check_gpus(step: str, client: APIClient, compute: DockerComputeSpec, count: int) -> None:
    """Return, unless the daemon can never start a container of this compute with ``count`` GPUs.

    Raises:
        StepFailedError: It can't.
    """
    info = client.info()
    daemon = daemon_url(compute)
    ids = compute.gpus if isinstance(compute.gpus, tuple) else ()  # any of them may be chosen
    named, others = _by_name(ids)
    if named:
        check_cdi_names(step, info, named, daemon)
    if (others or not ids) and not has_runtime(info) and _refuses(client):
        raise no_gpu_runtime(step, count, daemon)


def check_cdi_names(step: str, info: Mapping[str, Any], names: Sequence[str], daemon: str) -> None:
    """Return, unless a daemon with this ``/info`` has no GPU of one of these CDI names.

    Raises:
        StepFailedError: It has none.
    """
    found = info.get("DiscoveredDevices")
    if found is None:  # before Docker 28.2 a daemon says only where it would look
        if info.get("CDISpecDirs"):
            return
        why = "does not use the Container Device Interface (CDI)"
    else:
        offered = _cdi_devices(found)
        names = [name for name in names if name not in offered]
        if not names:
            return
        why = f"has {list_options(offered)}" if offered else "has found no devices"
    raise StepFailedError(
        step,
        f"it asks for the GPUs {list_options(names)}, but the Docker daemon at {daemon} {why}. Make the host's "
        "CDI files (nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml) and enable CDI in the daemon, or "
        "name other GPUs in the compute's 'gpus'.",
        retryable=False,
    )


def has_runtime(info: Mapping[str, Any]) -> bool:
    """Return whether a daemon with this ``/info`` certainly has a way to hand out GPUs."""
    devices = _cdi_devices(info.get("DiscoveredDevices") or ())
    return "nvidia" in (info.get("Runtimes") or ()) or any("/gpu=" in name for name in devices)


def is_refusal(error: APIError) -> bool:
    """Return whether the daemon started no container because it has no way to hand out GPUs."""
    return bool(_NO_GPU.search(str(error.explanation or error)))


def no_gpu_runtime(step: str, count: int, daemon: str) -> StepFailedError:
    """Return what to raise where a daemon has no way to hand out GPUs."""
    return StepFailedError(
        step,
        f"it asks for {count} GPUs, but the Docker daemon at {daemon} has no GPU runtime. Install "
        "the NVIDIA Container Toolkit on that host and restart the daemon, or drop gpus=.",
        retryable=False,
    )


def _refuses(client: APIClient) -> bool:
    """Return whether the daemon refuses to start a container with a GPU, of any image that it has.

    One that it does start does nothing, and all that was made is removed. Without an image there is no
    telling yet.
    """
    from docker.errors import APIError
    from docker.types import DeviceRequest

    images = client.images(quiet=True)
    if not images:
        return False
    container = None
    try:
        requests = [DeviceRequest(**request) for request in device_requests(1)]
        config = client.create_host_config(device_requests=requests, network_mode="none")
        made = client.create_container(
            images[0],
            name=f"{_PROBE}-{uuid.uuid4().hex}",
            entrypoint=[_PROBE_PROGRAM],
            host_config=config,
        )
        container = made["Id"]
        client.start(container)
    except APIError as error:  # an image that lacks the program says nothing of GPUs
        return is_refusal(error)
    finally:
        if container is not None:
            remove_container(client, container)
    return False


def _by_name(ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return those that are CDI names, and the others."""
    named = [name for name in ids if "/" in name and "=" in name]
    return named, [name for name in ids if name not in named]


def _cdi_devices(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(device["ID"]) for device in found if device.get("Source") == _CDI]
