"""What the cluster says about an object beside its state: its events, for whoever may list them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

_SHOWN = 400


def read_warnings(
    cluster: Cluster, owner: Mapping[str, Any], *, past: Collection[str] = ()
) -> list[str]:
    """Return what warns about an object, the last one last; nothing where that may not be asked.

    Args:
        cluster: The cluster.
        owner: The object, such as a pod.
        past: Reasons that do not matter any more, such as ``FailedScheduling`` of a pod that has a node.
    """
    selector = f"involvedObject.uid={owner['metadata']['uid']},type=Warning"
    try:
        found = cluster.ask("GET", "events", query={"fieldSelector": selector})["items"]
    except ClusterError:
        return []
    told = [event for event in found if event.get("reason") not in past]
    # The same is told time and again, with other times.
    texts = (f"{event.get('reason')}: {event.get('message')}" for event in sorted(told, key=_time))
    return list(dict.fromkeys(text[:_SHOWN] for text in texts))


def _time(event: Mapping[str, Any]) -> str:
    """Return when an event was told last: its newer form has other fields."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return str(next(filter(None, times), ""))
