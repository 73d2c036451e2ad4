"""A step on several nodes: as many containers, on a network that is theirs alone, from before until after.

All of them are made before the first one starts, and all are removed together. What holds for the one
container of other steps (docs/decisions/docker-containers.md) holds for them as a whole.
"""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.container_layout import LABEL_PREFIX, STEP_RUN_LABEL
from airflow_mlpipelines.compute.docker.container import (
    make_container,
    prepare_directories,
)
from airflow_mlpipelines.compute.docker.daemon import (
    connect,
    daemon_url,
    remove_container,
    stop_container,
)
from airflow_mlpipelines.compute.docker.failures import start_failure
from airflow_mlpipelines.compute.docker.watch import ALIVE, ENDED
from airflow_mlpipelines.compute.threads import in_parallel
from airflow_mlpipelines.exceptions import ComputeUnavailableError
from airflow_mlpipelines.runtime.nodes import GANG, TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from docker import APIClient

    from airflow_mlpipelines.compute.base import HandleStore, StepLaunch
    from airflow_mlpipelines.compute.docker.container import ContainerSpec
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

NODE_LABEL = f"{LABEL_PREFIX}node"
NODES_LABEL = f"{LABEL_PREFIX}nodes"
WAIT_SECONDS = 300
"""How long nodes wait for each other. They start within seconds; a machine may be very busy."""
_TOKEN_BYTES = 32
_NO_ADDRESSES = "non-overlapping"


def plan_nodes(
    spec: ContainerSpec, launch: StepLaunch, gpus: Sequence[str]
) -> tuple[ContainerSpec, ...]:
    """Return what to ask of the daemon for every node of ``launch``, of which ``spec`` is any.

    Each gets a share of ``gpus``, the ids of those for all of them.
    """
    hosts = [f"node-{node}" for node in range(launch.nodes)]
    token = secrets.token_hex(_TOKEN_BYTES)
    return tuple(
        replace(
            spec,
            name=name,
            env={
                **spec.env,
                GANG: json.dumps({"node": node, "hosts": hosts, "wait_seconds": WAIT_SECONDS}),
            },
            secrets={**spec.secrets, TOKEN: token},
            labels={**spec.labels, NODE_LABEL: str(node), NODES_LABEL: str(launch.nodes)},
            gpu_ids=tuple(gpus[node * spec.gpus : (node + 1) * spec.gpus]),
            network=spec.name,
            hostname=host,
        )
        for node, (host, name) in enumerate(zip(hosts, node_names(spec, launch), strict=True))
    )


def node_names(spec: ContainerSpec, launch: StepLaunch) -> list[str]:
    """Return the names of the containers of all nodes."""
    return [f"{spec.name}-{node}" for node in range(launch.nodes)]


def find_nodes(client: APIClient, step_run_id: str) -> list[dict[str, Any]]:
    """Return the containers of a step run's nodes, by node, as the daemon lists them."""
    label = f"{STEP_RUN_LABEL}={step_run_id}"
    found = client.containers(all=True, filters={"label": [label, NODE_LABEL]})
    return sorted(found, key=lambda each: int(each["Labels"][NODE_LABEL]))


def find_survivors(client: APIClient, step_run_id: str, handle: HandleStore) -> list[str] | None:
    """Return the ids of an earlier try's nodes, to adopt all of them; else remove what is there of them.

    As with one container, those that ended are adopted only while the handle says that nobody has read
    their end. If one is missing or never started, none is.
    """
    found = find_nodes(client, step_run_id)
    if found:
        ids = [str(each["Id"]) for each in found]
        states = {each["State"] for each in found}
        noted = (handle.get() or {}).get("containers")
        whole = len(ids) == int(found[0]["Labels"][NODES_LABEL])
        if whole and (
            (noted == ids and states <= ALIVE | ENDED) or (noted is None and states <= ALIVE)
        ):
            return ids
    remove_nodes(client, step_run_id)
    return None


def start_nodes(
    client: APIClient,
    launch: StepLaunch,
    specs: Sequence[ContainerSpec],
    handle: HandleStore,
    compute: DockerComputeSpec,
) -> list[str]:
    """Return the ids of the started containers, one for each of ``specs``; whatever fails on the way leaves none.

    Raises:
        StepFailedError: The daemon refuses one of them.
        ComputeUnavailableError: It can't make one at the moment.
    """
    from docker.errors import APIError

    uid = prepare_directories(client, launch, specs[0])
    spec = specs[0]
    containers: list[str] = []
    try:
        try:
            labels = {STEP_RUN_LABEL: launch.step_run_id}
            client.create_network(launch.step_run_id, driver="bridge", labels=labels)
            for spec in specs:  # whichever is refused is told of below
                containers.append(make_container(spec, client, uid=uid))  # noqa: PERF401
            # Noted before they start: whatever runs can be found again.
            handle.set({"launcher": "docker", "containers": containers})
            for spec, container in zip(specs, containers, strict=True):  # noqa: B007
                client.start(container)
        except APIError as error:
            if _NO_ADDRESSES in str(error.explanation):
                raise ComputeUnavailableError(
                    f"The Docker daemon at {daemon_url(compute)} has no addresses left for the network of step "
                    f"{launch.step_name!r}: remove networks that nobody uses (docker network prune), or give the "
                    "daemon more (default-address-pools)."
                ) from error
            raise start_failure(launch.step_name, error, spec, daemon_url(compute)) from error
    except BaseException:
        with suppress(ComputeUnavailableError, OSError):
            remove_nodes(connect(compute), launch.step_run_id)
        handle.set(None)
        raise
    return containers


def stop_nodes(compute: DockerComputeSpec, step_run_id: str, *, timeout: int = 60) -> None:
    """End all nodes' processes at once: two seconds after SIGTERM they are killed.

    Raises:
        ComputeUnavailableError: The daemon does not answer.
        OSError: It answers otherwise than expected.
    """
    client = connect(compute, timeout=timeout)
    ids = [str(each["Id"]) for each in find_nodes(client, step_run_id)]
    in_parallel(lambda container: stop_container(connect(compute, timeout=timeout), container), ids)


def remove_nodes(client: APIClient, step_run_id: str) -> None:
    """Kill and remove all that there is of a step run's nodes, with their network."""
    from docker.errors import NotFound

    for container in find_nodes(client, step_run_id):
        remove_container(client, container["Id"])
    filters = {"label": f"{STEP_RUN_LABEL}={step_run_id}"}
    for network in client.networks(filters=filters):
        with suppress(NotFound):
            client.remove_network(network["Id"])
