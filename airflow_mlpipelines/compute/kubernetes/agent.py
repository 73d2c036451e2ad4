"""The agent in a step's pod: what it is told to carry, and what it answers.

Both of its containers are of the compute's ``agent_image``. ``stage`` fetches by itself, and takes besides what the
worker sends; ``outputs`` commits when the worker asks it to. What it is to do, and the credentials for it, are one
document in the pod's Secret, which no other container mounts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import airflow_mlpipelines
from airflow_mlpipelines.agent.job import Job, WantedInput, WantedOutput, describe_all
from airflow_mlpipelines.compute.container_layout import container_paths
from airflow_mlpipelines.compute.kubernetes.channel import Channel, ChannelError
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, STAGE, mount_document
from airflow_mlpipelines.exceptions import DataError, StoreError
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.portable import describe_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from airflow_mlpipelines.compute.base import Emit, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
    from airflow_mlpipelines.storage.stores import Store

Json = dict[str, Any]
_AGENT = ("python3", "-m", "airflow_mlpipelines.agent")
_JOB_VOLUME = "mlp-job"
_JOB_DIRECTORY = "/mlp-job"
_JOB_NAME = "job.json"
_JOB_FILE = f"{_JOB_DIRECTORY}/{_JOB_NAME}"
_RESOURCES = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    "limits": {"cpu": "4", "memory": "2Gi"},
}
_STAGING_SECONDS = 24 * 3600
"""What a pod gets on top of its deadline: data may be many."""


def can_carry(compute: KubernetesComputeSpec, store: Store) -> bool:
    """Return whether the agent of a compute's pods moves the data of a datastore."""
    return compute.agent_image is not None and describe_store(store) is not None


def add_agent(spec: PodSpec, launch: StepLaunch, compute: KubernetesComputeSpec) -> PodSpec:
    """Return the pod with the agent in the place of the helpers, and its job in the pod's Secret."""
    manifest = spec.manifest["spec"]
    stage = next(item for item in manifest["initContainers"] if item["name"] == STAGE)
    keeper = next(item for item in manifest["containers"] if item["name"] == OUTPUTS_KEEPER)
    for helper in (stage, keeper):
        helper["image"] = compute.agent_image
        helper["resources"] = _RESOURCES
    stage["command"] = [*_AGENT, "stage", _JOB_FILE]
    # An unexpected end leaves its last words where the worker finds them.
    stage["terminationMessagePolicy"] = "FallbackToLogsOnError"
    mount_document(
        spec, _JOB_NAME, volume=_JOB_VOLUME, directory=_JOB_DIRECTORY, containers=(stage, keeper)
    )
    if "activeDeadlineSeconds" in manifest:
        manifest["activeDeadlineSeconds"] += _STAGING_SECONDS
    return replace(spec, documents={_JOB_NAME: make_job(launch).to_json()})


def make_job(launch: StepLaunch) -> Job:
    """Return what the agent has to do for a step run."""
    carriage, stage = launch.carriage, launch.stage
    stores = {store.name: store for store, _ in carriage.inputs.values()}
    stores |= {item.store.name: item.store for item in carriage.outputs.values()}
    stores |= {store.name: store for store, _ in filter(None, (carriage.snapshot, carriage.kept))}
    paths = container_paths(stage, None)
    addresses = {**paths.outputs, **paths.inputs}
    return Job(
        release=airflow_mlpipelines.__version__,
        step=launch.step_name,
        step_run=launch.step_run_id,
        datastores=describe_all(stores),
        snapshot=_named(carriage.snapshot),
        inputs={
            name: WantedInput(artifact=artifact, target=stage.carried[name])
            for name, (_, artifact) in carriage.inputs.items()
        },
        outputs={
            name: WantedOutput(
                datastore=item.store.name,
                path=item.path,
                source=stage.outputs[name].relative_to(stage.outputs_root).as_posix(),
                is_directory=item.is_directory,
            )
            for name, item in carriage.outputs.items()
        },
        links={
            name: (link, addresses[name])
            for name, link in carriage.links.items()
            if name in addresses
        },
        kept=_named(carriage.kept),
    )


def commit(
    cluster: Cluster,
    pod: str,
    launch: StepLaunch,
    *,
    emit: Emit,
    with_outputs: bool,
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Have the agent commit what the step has made, and note it in the launch's carriage.

    Safe to repeat: what is committed already is told again. It is done with the credentials that this worker has,
    which may be newer than the pod.

    Args:
        cluster: The cluster.
        pod: The pod's name, whose step has ended.
        launch: The step run.
        emit: Takes the agent's lines.
        with_outputs: False for a step that failed: only ``./outputs`` and ``./logs`` are kept then.
        heard: Called whenever the agent lets us know that it is at work.

    Raises:
        StoreError: An output can't be sent. It is still there to be sent.
        DataError: An output was not made, or is of the wrong kind.
        ChannelError: The connection broke, or the agent did. Nothing is known of what it has done.
    """
    verb = "commit" if with_outputs else "keep"
    made: Json | None = None
    with Channel(cluster, pod, OUTPUTS_KEEPER, [*_AGENT, verb, _JOB_FILE]) as channel:
        channel.write(json.dumps(make_job(launch).datastores).encode() + b"\n")
        for message in _messages(channel):
            heard()
            if "say" in message:
                emit(str(message["say"]))
            elif "error" in message:
                kind = StoreError if message.get("store") else DataError
                raise kind(str(message["error"]))
            elif "result" in message:
                made = message["result"]
    if made is None:
        raise ChannelError("the agent's answer has not arrived whole")
    committed = {name: Artifact.from_dict(value) for name, value in made.items()}
    if with_outputs and committed.keys() != launch.carriage.outputs.keys():
        raise DataError(
            f"step {launch.step_name!r}: the agent of its pod has committed {sorted(committed)}, but this worker "
            f"expects {sorted(launch.carriage.outputs)}. Have all workers the same connections and key files?"
        )
    launch.carriage.committed.update(committed)


def staging_failure(facts: Mapping[str, Any]) -> DataError | None:
    """Return the agent's own error, from how its container ``stage`` has ended; None if it left none."""
    try:
        message = json.loads(facts.get("message") or "")["error"]
    except (ValueError, TypeError, KeyError):
        return None
    return DataError(str(message))


def _messages(channel: Channel) -> Iterator[Json]:
    said = b""
    for data in channel.read():
        said += data
        *lines, said = said.split(b"\n")
        for line in lines:
            message = _parse(line)
            if message is not None:
                yield message


def _parse(line: bytes) -> Json | None:
    """Return a message; None for what a driver prints in between."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _named(pair: tuple[Store, str] | None) -> tuple[str, str] | None:
    return None if pair is None else (pair[0].name, pair[1])
