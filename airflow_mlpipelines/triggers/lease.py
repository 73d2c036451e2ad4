"""Waiting, without a worker slot, until somebody else has made the outputs that a step wants."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from airflow_mlpipelines.triggers.leases import open_leases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


_FIRST_LOOK_SECONDS = 5.0
"""A trigger that fires sooner may overtake the executor's word that its task has been deferred. The scheduler
then takes that word for the end of the task that it has just queued again, and fails it."""


class LeaseTrigger(BaseTrigger):
    """Fires when the lease on a fingerprint is free: released, or run out because its holder died.

    Not within the first five seconds: that would be too soon for the scheduler.
    """

    def __init__(self, fingerprint: str, poll_seconds: float = 2.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fingerprint = fingerprint
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and the arguments to make this trigger again; no secret is in them."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"fingerprint": self.fingerprint, "poll_seconds": self.poll_seconds},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event, when the lease is free."""
        leases = await sync_to_async(open_leases)()
        await asyncio.sleep(_FIRST_LOOK_SECONDS)
        while True:
            held = await asyncio.to_thread(leases.find, self.fingerprint)
            if held is None:
                yield TriggerEvent({"reason": "the lease is free"})
                return
            await asyncio.sleep(self.poll_seconds)
