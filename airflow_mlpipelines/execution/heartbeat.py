"""Holding the lease on a fingerprint while a step works, with a heartbeat from a thread."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_mlpipelines.caching.lease import Held, Lease, Leases
from airflow_mlpipelines.exceptions import MLPipelinesError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlpipelines.caching.index import MetadataIndex

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""How long a lease outlives its holder: a waiting step takes over this long after a crash."""
_RENEW_SECONDS = LEASE_SECONDS / 4


class LeaseHeldError(MLPipelinesError):
    """Somebody else is making the same outputs right now.

    Attributes:
        fingerprint: What they are making.
        held: Who holds it, and until when unless they renew it.
    """

    def __init__(self, fingerprint: str, held: Held) -> None:
        self.fingerprint = fingerprint
        self.held = held
        super().__init__(f"{held.by} is making the same outputs right now")


@contextmanager
def hold_lease(index: MetadataIndex, fingerprint: str, holder: str) -> Iterator[None]:
    """Hold the lease on ``fingerprint`` inside the block; renew it from a thread meanwhile.

    Raises:
        LeaseHeldError: Somebody else holds it.
    """
    leases = Leases(index)
    lease = leases.acquire(fingerprint, holder, ttl=LEASE_SECONDS)
    if isinstance(lease, Held):
        raise LeaseHeldError(fingerprint, lease)
    over = threading.Event()
    thread = threading.Thread(
        target=_renew_until, args=(leases, lease, over), name="lease-heartbeat", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)
        leases.release(lease)


def _renew_until(leases: Leases, lease: Lease, over: threading.Event) -> None:
    while not over.wait(_RENEW_SECONDS):
        try:
            still_held = leases.renew(lease, ttl=LEASE_SECONDS)
        except MLPipelinesError as error:  # the database may be back at the next beat
            log.warning("The lease could not be renewed: %s", error)
            continue
        if not still_held:
            log.warning(
                "The lease was lost: this worker was away for over %s s, and somebody else may be "
                "making the same outputs. Both results are whole; the last to commit is remembered.",
                LEASE_SECONDS,
            )
            return
