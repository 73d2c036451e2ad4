"""What the API server does not do, in words: its absence, its credentials, its rules and its quotas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.kubernetes.cluster import (
    FORBIDDEN,
    NOT_FOUND,
    UNAUTHORIZED,
    UNREACHABLE,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster, ClusterError
    from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
    from airflow_mlpipelines.exceptions import MLPipelinesError

_SHOWN = 600
_CLIENT_ERRORS = range(400, 500)
_NO_RIGHT = re.compile(r'User ".*" cannot \w+ resource')
_DENIED = re.compile(
    r"admission webhook \"[^\"]*\" denied|ValidatingAdmissionPolicy '[^']*'.* denied request"
)
_EXCEEDED = re.compile(
    r"exceeded quota: (?P<quota>[^,]+), requested: (?P<requested>.*), used: (?P<used>.*), limited: (?P<limited>.*)"
)
_MUST_SPECIFY = re.compile(r"failed quota: (?P<quota>[^:]+): must specify (?P<what>.*)")
_OUT_OF_RANGE = re.compile(r"(?:maximum|minimum) \S+ usage per|limit to request ratio per")


@dataclass(frozen=True)
class Shortage:
    """What a quota has no room for.

    Attributes:
        quota: Its name.
        requested: Of each resource that there is not enough of, how much is asked for, as the cluster writes it.
        limited: How much the quota grants to all together.
    """

    quota: str
    requested: dict[str, str]
    limited: dict[str, str]

    @property
    def too_large(self) -> str | None:
        """The resource of which more is asked for than the quota ever grants; None where room can come."""
        for name, amount in self.requested.items():
            limit = self.limited.get(name)
            if limit is not None and _amount(amount) > _amount(limit):
                return name
        return None


def find_shortage(error: ClusterError) -> Shortage | None:
    """Return what a quota has no room for, if that is why the API server refuses."""
    match = _EXCEEDED.search(str(error)) if error.status == FORBIDDEN else None
    if match is None:
        return None
    return Shortage(match["quota"], _amounts(match["requested"]), _amounts(match["limited"]))


def refusal(
    step: str, error: ClusterError, compute: KubernetesComputeSpec, cluster: Cluster
) -> MLPipelinesError:
    """Return what to raise when the API server does not do what it is asked for."""
    said = str(error)[:_SHOWN]
    where = f"compute {compute.name!r}: the cluster at {cluster.url}"
    if error.status == UNREACHABLE:
        return ComputeUnavailableError(
            f"{where} does not answer: {said}. Check its address, and this worker's way to it."
        )
    if error.status in _CLIENT_ERRORS and _DENIED.search(str(error)):
        return _not_admitted(step, said)
    if error.status == UNAUTHORIZED:
        return ComputeUnavailableError(
            f"{where} does not take this worker's credentials (401: {said}). The token has expired, or was "
            "never valid: renew it in the Airflow connection, the kubeconfig or the service account."
        )
    if error.status == FORBIDDEN:
        return _forbidden(step, error, compute)
    if error.status == NOT_FOUND and "namespaces" in said:
        return StepFailedError(
            step,
            f"the cluster has no namespace {compute.namespace!r}, which compute {compute.name!r} names. "
            f"Create it (kubectl create namespace {compute.namespace}), or correct namespace=.",
            retryable=False,
        )
    if error.may_pass:
        return ComputeUnavailableError(f"{where} is not well ({error.status}): {said}")
    return StepFailedError(
        step, f"the cluster refused its pod ({error.status}): {said}", retryable=False
    )


def _forbidden(step: str, error: ClusterError, compute: KubernetesComputeSpec) -> StepFailedError:
    said, whole = str(error)[:_SHOWN], str(error)
    shortage = find_shortage(error)
    if shortage is not None:
        return _no_room(step, said, shortage, compute)
    unspecified = _MUST_SPECIFY.search(whole)
    if unspecified is not None:
        return StepFailedError(
            step,
            f"quota {unspecified['quota']!r} of namespace {compute.namespace!r} takes only pods that say what they "
            f"use: {said}. Give the step, or its compute, memory=, cpus= or ephemeral_storage= accordingly, or have "
            "defaults set for the namespace (a LimitRange).",
            retryable=False,
        )
    if _OUT_OF_RANGE.search(whole):
        return StepFailedError(
            step,
            f"a LimitRange of namespace {compute.namespace!r} does not allow its pod: {said}. Change memory=, cpus= or "
            "ephemeral_storage= of the step or of its compute accordingly, or have the range changed.",
            retryable=False,
        )
    if _NO_RIGHT.search(whole):
        return StepFailedError(
            step,
            f"this worker may not do that in namespace {compute.namespace!r}: {said}. Its service account or user, "
            "and the triggerer's, need pods (create, get, list, watch, patch, delete), pods/log (get), pods/exec (create, "
            "get) and secrets (create, delete); for steps on several nodes also jobs of the API group batch (create, get, "
            "patch, delete), services (create, delete) and, for better errors, events (list). This project's "
            "deploy/helm/rbac.yaml grants these.",
            retryable=False,
        )
    return _not_admitted(step, said)


def _no_room(
    step: str, said: str, shortage: Shortage, compute: KubernetesComputeSpec
) -> StepFailedError:
    where = f"quota {shortage.quota!r} of namespace {compute.namespace!r}"
    large = shortage.too_large
    if large is None:
        return StepFailedError(
            step,
            f"{where} leaves no room for what it needs: {said}. Wait until others have ended, ask for less, or have "
            "the quota raised.",
        )
    return StepFailedError(
        step,
        f"it needs more than {where} grants to all together ({large}: {shortage.requested[large]} of "
        f"{shortage.limited[large]}): {said}. Ask for less, or have the quota raised.",
        retryable=False,
    )


def _not_admitted(step: str, said: str) -> StepFailedError:
    return StepFailedError(
        step,
        f"the cluster's rules do not admit its pod: {said}. Change the step or its compute (memory, cpus, labels, "
        "security_context, service_account, priority_class, runtime_class, pod_template_file), or have the rule changed.",
        retryable=False,
    )


def _amounts(text: str) -> dict[str, str]:
    """Return the amounts of ``pods=1,requests.cpu=500m``, by resource."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name.strip(): amount.strip() for name, _, amount in pairs}


def _amount(text: str) -> float:
    from kubernetes.utils.quantity import parse_quantity

    try:
        return float(parse_quantity(text))
    except ValueError:  # of a form that only later releases know
        return 0.0
