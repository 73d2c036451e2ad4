"""Where a compute keeps what its steps have launched, for whoever removes what was left there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import ComputeSpec

LAUNCH = "launch"
"""The label with the word that tells our own from what others have launched."""


def find_site(compute: ComputeSpec) -> dict[str, Any] | None:
    """Return the place as JSON, the same for all computes that share it; None where nobody can come back to it.

    A process, and a container of a daemon, are found by the next step on their own machine alone.
    """
    if compute.type != "kubernetes":
        return None
    return {
        "type": compute.type,
        "namespace": compute.namespace,
        "conn_id": compute.conn_id,
        "in_cluster": compute.in_cluster,
    }


def remove_left(
    compute: ComputeSpec, step_run_id: str, *, word: str, nodes: int, only_ended: bool
) -> bool:
    """Return whether nothing of a launch is left on a compute that has a site, or all of it was told to go.

    Args:
        compute: The compute.
        step_run_id: Whose launch it was.
        word: Nothing that bears another one is touched.
        nodes: On how many machines it ran.
        only_ended: Whether a program that may still run is left alone.

    Raises:
        ComputeUnavailableError: The compute does not answer, or refuses.
    """
    from airflow_mlpipelines.compute.kubernetes import releasing

    if compute.type != "kubernetes":
        return True
    return releasing.remove_left(
        compute, step_run_id, word=word, is_gang=nodes > 1, only_ended=only_ended
    )
