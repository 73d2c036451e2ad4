"""Holding the lease on a fingerprint while a step works, with a heartbeat from a thread."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from airflow_mlpipelines.caching.lease import LEFT_SECONDS, Held, Lease, Leases
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


class HeldLease:
    """A lease that is held, with a thread that renews it."""

    def __init__(self, leases: Leases, lease: Lease) -> None:
        self._leases = leases
        self._lease = lease
        self._over = threading.Event()
        self.released = False
        self.left = False
        self._thread = threading.Thread(
            target=_renew_until,
            args=(leases, lease, self._over),
            name="lease-heartbeat",
            daemon=True,
        )
        self._thread.start()

    def stop_renewing(self) -> None:
        """End the thread. It has to come before a transaction: the thread would wait for its end, and it for the thread."""
        self._over.set()
        self._thread.join(timeout=5)

    def leave(self) -> dict[str, str]:
        """Let it last beyond this worker, and return its JSON form for whoever renews it from now on."""
        self.stop_renewing()
        self.left = True
        try:
            if not self._leases.renew(self._lease, ttl=LEFT_SECONDS):
                log.warning("The lease was lost: somebody else may be making the same outputs")
        except MLPipelinesError as error:  # whoever renews it from now on begins at once
            log.warning("The lease could not be renewed: %s", error)
        return asdict(self._lease)

    def release(self) -> None:
        """Give it back, as part of the transaction that is open, if one is."""
        self.stop_renewing()
        self._leases.release(self._lease)
        self.released = True


@contextmanager
def hold_lease(index: MetadataIndex, fingerprint: str, holder: str) -> Iterator[HeldLease]:
    """Hold the lease on ``fingerprint`` to the end of the block, unless it is released or left in there.

    Raises:
        LeaseHeldError: Somebody else holds it.
    """
    leases = Leases(index)
    lease = leases.acquire(fingerprint, holder, ttl=LEASE_SECONDS)
    if isinstance(lease, Held):
        raise LeaseHeldError(fingerprint, lease)
    held = HeldLease(leases, lease)
    try:
        yield held
    except BaseException:
        if not held.left:
            held.release()  # again, if the transaction in which it was released has been undone
        raise
    if not held.released:
        held.release()


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
