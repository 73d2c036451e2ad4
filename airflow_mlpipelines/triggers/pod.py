"""Waiting, without a worker slot, for a step's pod."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mlpipelines.triggers.leases import release_left, renew_left
from airflow_mlpipelines.triggers.log_files import put_aside_earlier_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

_FIRST_EVENT_SECONDS = 5.0
"""As in :mod:`airflow_mlpipelines.triggers.lease`: sooner, the scheduler would take the task for failed."""
_RENEW_SECONDS = 60.0
_TAKEOVER_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
"""A triggerer's first question of this kind takes long: it loads an API server for it."""
_KILL_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0)
_removals: set[asyncio.Task[None]] = set()
_lines = structlog.get_logger("airflow_mlpipelines.step")


class PodTrigger(BaseTrigger):
    """Fires when a worker is needed for a step whose pod was left to itself.

    Meanwhile it hands on the step's log, each line with the time at which it was printed, and renews the step's
    lease. Where somebody stops the task, it removes the pod.

    Args:
        watch: A :class:`~airflow_mlpipelines.compute.kubernetes.detaching.PodWatch` in its JSON form.
        lease: ``{"fingerprint", "holder", "token"}`` of the step's lease; None without one. The token only tells
            one holder from the next; who can use it can change the lease without it.
    """

    def __init__(self, watch: dict[str, Any], lease: Mapping[str, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch
        self._token = uuid.uuid4().hex
        self.lease = dict(lease) if lease is not None else None

    @property
    def task_instance(self) -> Any:
        """The task instance that waits; set by the triggerer, before the trigger's first line."""
        return self._task_instance

    @task_instance.setter
    def task_instance(self, value: Any) -> None:
        self._task_instance = value
        if value is not None:
            self.task_id = value.task_id
            put_aside_earlier_lines(value)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and the arguments to make this trigger again; no secret is in them."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"watch": self.watch, "lease": self.lease},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event, with what was found."""
        from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter
        from airflow_mlpipelines.compute.kubernetes.detaching import PodWatch

        too_soon = asyncio.create_task(asyncio.sleep(_FIRST_EVENT_SECONDS))
        renewing = asyncio.create_task(self._renew())
        try:
            watch = PodWatch.from_dict(self.watch)
            news = await PodAwaiter(watch, _emit, token=self._token).wait()
            await too_soon
            yield TriggerEvent(news.to_dict())
        finally:
            for task in (too_soon, renewing):
                task.cancel()
            await asyncio.gather(too_soon, renewing, return_exceptions=True)

    async def on_kill(self) -> None:
        """Remove the pod and give the lease back: somebody has stopped or cleared the task.

        Airflow calls this also where another triggerer has taken the trigger over: a task that is still
        deferred, as far as anybody can tell, gets half a minute, in which whoever goes on with the pod takes it
        over. And it cancels this, too, when it takes longer than a second or so, by cancelling the trigger again:
        the removal goes on all the same. A pod that can't be removed keeps its lease until that runs out.
        """
        removal = asyncio.create_task(self._end())
        _removals.add(removal)
        removal.add_done_callback(_removals.discard)
        await asyncio.shield(removal)

    async def _end(self) -> None:
        from airflow_mlpipelines.compute.kubernetes.awaiting import remove_pods
        from airflow_mlpipelines.compute.kubernetes.cluster import ClusterError
        from airflow_mlpipelines.compute.kubernetes.detaching import PodWatch
        from airflow_mlpipelines.exceptions import ComputeUnavailableError

        watch = PodWatch.from_dict(self.watch)
        if await self._may_be_taken_over():
            if not watch.pods:  # by whom can't be told: the lease runs out by itself
                return
            await asyncio.sleep(_TAKEOVER_SECONDS)
        for pause in _KILL_PAUSES:
            await asyncio.sleep(pause)
            if not watch.pods:  # there was no room for one
                break
            try:
                if not await remove_pods(watch, token=self._token):
                    return
            except (ClusterError, ComputeUnavailableError) as error:
                self.log.warning("Pod %s can't be removed: %s", ", ".join(watch.pods), error)
            else:
                self.log.info("Removed pod %s", ", ".join(watch.pods))
                break
        else:
            # Whatever still runs may yet make its outputs: the lease keeps others out for as long as it lasts.
            self.log.error("Pod %s was not removed, and may still run", ", ".join(watch.pods))
            return
        if self.lease is not None:
            with suppress(Exception):  # it runs out by itself
                await asyncio.to_thread(release_left, self.lease)

    async def _may_be_taken_over(self) -> bool:
        """Return whether the task is still deferred, or nobody can tell in time."""
        try:
            return await asyncio.wait_for(self._is_still_deferred(), _ANSWER_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, the pod has to be looked after
            self.log.warning("Whether the task is still deferred is not known: %r", error)
            return True

    async def _is_still_deferred(self) -> bool:
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        ti: Any = self.task_instance
        if ti is None:
            return False
        found = await asyncio.to_thread(
            RuntimeTaskInstance.get_task_states,
            dag_id=ti.dag_id,
            task_ids=[ti.task_id],
            run_ids=[ti.run_id],
            map_index=ti.map_index,
        )
        states = found.get(ti.run_id, {})
        return any(
            state == "deferred"
            for name, state in states.items()
            if name in (ti.task_id, f"{ti.task_id}_{ti.map_index}")
        )

    async def _renew(self) -> None:
        """Keep the lease, beginning at once: the worker that took it has left."""
        if self.lease is None:
            return
        while True:
            try:
                self.lease = await asyncio.to_thread(renew_left, self.lease)
            except Exception as error:  # noqa: BLE001 - whatever it is, the pod goes on
                self.log.warning("The lease could not be renewed: %s", error)
            await asyncio.sleep(_RENEW_SECONDS)


def _emit(time: str, line: str) -> None:
    # A trigger that another triggerer goes on with begins anew. Its lines come with the same times again, and
    # whoever reads the log from all its files sees each of them once.
    _lines.info(line, timestamp=time)
