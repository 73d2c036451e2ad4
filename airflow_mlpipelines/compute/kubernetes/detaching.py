"""Pods that are left to themselves: what a worker tells a trigger of them, and a trigger the next worker.

Both are small JSON without secrets: Airflow keeps them in its database, and shows them in its log. They are written
for the pods of one step run: one, or, of a step on several nodes, one for each node.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.pod import STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.watch import (
    container_state,
    find_condition,
    is_leaving,
    is_lost,
    is_over,
)
from airflow_mlpipelines.definition.graph import KubernetesComputeSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.compute.kubernetes.starting import StartErrors

Json = dict[str, Any]
_SHOWN = 600


class Awaited(StrEnum):
    """What a worker is needed for next."""

    FILES = "files"
    """The pod waits for a node and its images; once it has them, it wants the step's files."""
    END = "end"
    """The pod has the files, or finds them in its Secret; once the step has ended, there is something to fetch."""
    ROOM = "room"
    """There is no pod yet: a quota has no room for it, and it is to be tried again after a while."""


class Reason(StrEnum):
    """Why a trigger calls for a worker."""

    READY = "ready for its files"
    ENDED = "its step has ended"
    OVER = "it is over"
    GONE = "it is gone"
    HOPELESS = "it will never start"
    UNSCHEDULED = "no node took it in time"
    UNSTARTED = "it did not start in time"
    EXPIRED = "the step's time is up"
    UNSEEN = "it can't be watched"
    RETRY = "there may be room for it"


@dataclass(frozen=True)
class PodWatch:
    """What a trigger has to know of the pods of a step run.

    Attributes:
        compute: The compute's name.
        selector: The label that the pods share.
        pods: The name and ``uid`` of each.
        secret: The name of their Secret, which a kill removes; None without one.
        awaits: What to wait for.
        logs: For each pod how far its log was read (:meth:`~.logs.StepLog.to_dict`); None from the beginning.
            Under ``<pod>/stage``, that of its agent: the next worker reads what is left, if it is named.
        job: The name of the pods' Job and Service, which a kill removes; None of a single pod.
        pause_seconds: How long to wait for :attr:`Awaited.ROOM`.
        left_at: When the worker left them, as an ISO time: lines that were printed before come later in the log.
    """

    compute: str
    namespace: str
    conn_id: str | None
    in_cluster: bool | None
    selector: str
    pods: Mapping[str, str]
    secret: str | None
    awaits: Awaited
    schedule_seconds: float
    startup_seconds: float
    timeout_seconds: float | None
    logs: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    job: str | None = None
    pause_seconds: float = 0.0
    left_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat())

    @property
    def access(self) -> KubernetesComputeSpec:
        """As much of the compute as it takes to reach its cluster."""
        return KubernetesComputeSpec(
            name=self.compute,
            namespace=self.namespace,
            conn_id=self.conn_id,
            in_cluster=self.in_cluster,
        )

    def to_dict(self) -> Json:
        """Return the JSON form."""
        return {**asdict(self), "awaits": self.awaits.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PodWatch:
        """Return what :meth:`to_dict` has written."""
        return cls(**{**data, "awaits": Awaited(data["awaits"])})


@dataclass(frozen=True)
class PodNews:
    """What a trigger has found: facts, which a worker judges.

    Attributes:
        message: Why the pods can't be watched, in words.
        pods: Of pods that may be gone by now, how they were seen last.
        logs: For each pod how far its log was handed on.
    """

    reason: Reason
    message: str = ""
    pods: Mapping[str, Json] = field(default_factory=dict)
    logs: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def to_dict(self) -> Json:
        """Return the JSON form."""
        return {**asdict(self), "reason": self.reason.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PodNews:
        """Return what :meth:`to_dict` has written."""
        return cls(**{**data, "reason": Reason(data["reason"])})


def judge(
    watch: PodWatch, pods: Mapping[str, Json], now: datetime, errors: StartErrors
) -> Reason | None:
    """Return why a worker is needed, or None while the pods do well without one.

    Args:
        watch: What is waited for.
        pods: Each pod's name and how it is now, or, gone, None.
        now: By the API server's clock.
        errors: What has been seen of them before.
    """
    verdicts = []
    for name, uid in watch.pods.items():
        pod = pods.get(name)
        if pod is None or pod["metadata"]["uid"] != uid:
            return Reason.GONE
        verdicts.append(
            _judge_files(watch, pod, now, errors) or _judge_end(watch, pod, now, errors)
        )
    called_off = [verdict for verdict in verdicts if verdict not in (None, *_IN_TURN)]
    if called_off:
        return called_off[0]
    return verdicts[0] if verdicts and None not in verdicts else None


_IN_TURN = (Reason.READY, Reason.ENDED)
"""What every pod has to have reached before a worker can do something about it."""


def remember(pod: Json) -> Json:
    """Return what a worker has to know of a pod that is gone."""
    meta, status = pod["metadata"], pod.get("status", {})
    kept = ("name", "uid", "deletionTimestamp")
    found: Json = {
        "metadata": {key: meta[key] for key in kept if key in meta},
        "spec": {},
        "status": {key: status[key] for key in ("phase", "reason") if key in status},
    }
    if status.get("message"):
        found["status"]["message"] = str(status["message"])[:_SHOWN]
    condition = find_condition(pod, "DisruptionTarget")
    if condition:
        fields = ("type", "status", "reason", "message")
        told = {key: str(condition.get(key, ""))[:_SHOWN] for key in fields}
        found["status"]["conditions"] = [told]
    for kind, name in (("initContainerStatuses", STAGE), ("containerStatuses", STEP)):
        state, facts = container_state(pod, name)
        kept_facts = ("exitCode", "reason", "message") if name == STAGE else ("exitCode", "reason")
        told = {key: value for key, value in facts.items() if key in kept_facts}
        found["status"][kind] = [{"name": name, "state": {state: told}}]
    return found


def _judge_files(watch: PodWatch, pod: Json, now: datetime, errors: StartErrors) -> Reason | None:
    if watch.awaits is not Awaited.FILES:
        return None
    if container_state(pod, STAGE)[0] == "running":
        return Reason.READY
    if is_over(pod):
        return Reason.OVER
    return _judge_start(watch, pod, now, _scheduled_at(pod), errors)


def _judge_end(watch: PodWatch, pod: Json, now: datetime, errors: StartErrors) -> Reason | None:
    if watch.awaits is not Awaited.END:
        return None
    state, facts = container_state(pod, STEP)
    if state == "terminated":
        return Reason.ENDED
    if is_leaving(pod):  # a program may use its grace to save what it has
        return Reason.OVER if is_lost(pod, now) else None
    if is_over(pod):
        return Reason.OVER
    if state == "waiting":
        stage, staged = container_state(pod, STAGE)
        if stage == "running":  # the agent takes as long as there are data
            return None
        since = _time(staged.get("finishedAt")) or _scheduled_at(pod)
        return _judge_start(watch, pod, now, since, errors)
    began = _time(facts.get("startedAt"))
    if watch.timeout_seconds is not None and began is not None:
        return Reason.EXPIRED if _seconds(began, now) > watch.timeout_seconds else None
    return None


def _judge_start(
    watch: PodWatch,
    pod: Json,
    now: datetime,
    scheduled_at: datetime | None,
    errors: StartErrors,
) -> Reason | None:
    created = _time(pod["metadata"].get("creationTimestamp")) or now
    waited = _seconds(scheduled_at or created, now)
    if errors.is_hopeless(pod, waited):
        return Reason.HOPELESS
    if scheduled_at is None:
        return Reason.UNSCHEDULED if waited > watch.schedule_seconds else None
    return Reason.UNSTARTED if waited > watch.startup_seconds else None


def _scheduled_at(pod: Json) -> datetime | None:
    condition = find_condition(pod, "PodScheduled")
    return _time(condition.get("lastTransitionTime")) if condition.get("status") == "True" else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None


def _seconds(since: datetime, now: datetime) -> float:
    return (now - since).total_seconds()
