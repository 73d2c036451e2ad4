"""Waiting for pods that were left to themselves, in a trigger: one watch, and one stream for each log."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.kubernetes.async_cluster import AsyncCluster
from airflow_mlpipelines.compute.kubernetes.cluster import NOT_FOUND, ClusterError
from airflow_mlpipelines.compute.kubernetes.detaching import (
    Awaited,
    PodNews,
    Reason,
    judge,
    remember,
)
from airflow_mlpipelines.compute.kubernetes.lifetime import KILL_SECONDS, belongs_to
from airflow_mlpipelines.compute.kubernetes.logs import AscendingTimes, StepLog
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, OWNER, STAGE, STEP
from airflow_mlpipelines.compute.kubernetes.starting import StartErrors
from airflow_mlpipelines.compute.kubernetes.watch import container_state
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from airflow_mlpipelines.compute.kubernetes.detaching import PodWatch

Json = dict[str, Any]
AWAY_SECONDS = 3600.0
"""How long the API server may be away, or refuse, before a worker is called to look after the pods."""
REFUSED_SECONDS = 120.0
_LOOK_SECONDS = 10.0
_WATCH_SECONDS = 290
_SILENCE_SECONDS = 150.0
_LOG_END_SECONDS = 3.0
_FIRST_CONTACT_SECONDS = (120.0, 300.0)
"""Late enough that most steps are over, and soon enough for a triggerer that is restarted now and then."""
_CONTACT_SECONDS = 3600.0
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
_LARGEST_CHANGE = 16 << 20
_REACHED = frozenset({Reason.ENDED, Reason.OVER, Reason.GONE})


class PodAwaiter:
    """Waits until there is something for a worker to do about the pods of one step run."""

    def __init__(
        self, watch: PodWatch, emit: Callable[[str, str], None], *, token: str = ""
    ) -> None:
        """Prepare; nothing is asked of the cluster yet.

        Args:
            watch: What to wait for.
            token: A word of its own, which it notes at the pods: they are its own from then on.
            emit: Takes a line's time, and the line.
        """
        self._watch = watch
        self._token = token
        self._is_owner = not token
        self._errors = StartErrors()
        self._pods: dict[str, Json] = {}
        self._last: dict[str, Json] = {}
        self._logs = {
            name: StepLog(AscendingTimes(emit, after=watch.left_at), watch.logs.get(name))
            for name in watch.pods
        }
        self._begun = {name: asyncio.Event() for name in watch.pods}

    async def wait(self) -> PodNews:
        """Return what has happened, once a worker is needed."""
        if self._watch.awaits is Awaited.ROOM:
            # Only who makes a pod finds out whether there is room. Not all who wait try at once.
            await asyncio.sleep(self._watch.pause_seconds * random.uniform(0.8, 1.2))  # noqa: S311
            return PodNews(Reason.RETRY)
        try:
            async with AsyncCluster(self._watch.access) as cluster:
                return await self._wait(cluster)
        except (ComputeUnavailableError, ImportError) as error:
            return PodNews(Reason.UNSEEN, str(error), logs=dict(self._watch.logs))

    async def _wait(self, cluster: AsyncCluster) -> PodNews:
        tasks = []
        if self._watch.awaits is Awaited.END:
            tasks = [asyncio.create_task(self._follow(cluster, name)) for name in self._logs]
        contact = asyncio.create_task(self._keep_contact(cluster))
        try:
            message = ""
            try:
                reason = await self._look(cluster)
            except _UnseenError as error:
                reason, message = Reason.UNSEEN, str(error)
            if tasks and reason in _REACHED:
                await asyncio.wait(tasks, timeout=_LOG_END_SECONDS)
        finally:
            for task in (contact, *tasks):
                task.cancel()
            await asyncio.gather(contact, *tasks, return_exceptions=True)
        logs: dict[str, Any] = dict(self._watch.logs)
        if tasks:
            logs |= {name: log.to_dict() for name, log in self._logs.items()}
        gone = {name: remember(pod) for name, pod in self._last.items()}
        return PodNews(reason, message, gone if reason in _REACHED else {}, logs)

    # ---- the pods --------------------------------------------------------------------------

    async def _look(self, cluster: AsyncCluster) -> Reason:
        away_since: float | None = None
        pause = _FIRST_PAUSE
        while True:
            try:
                query = {"labelSelector": self._watch.selector}
                found = await cluster.ask("GET", "pods", query=query)
                away_since, pause = None, _FIRST_PAUSE
                self._pods = {}
                for pod in found["items"]:
                    self._take(pod)
                await self._take_over(cluster)
                reason = self._judge(cluster)
                if reason is None:
                    version = str(found["metadata"]["resourceVersion"])
                    reason = await self._watch_changes(cluster, version)
                if reason is not None:
                    return reason
            except ClusterError as error:
                now = time.monotonic()
                away_since = away_since or now
                patience = AWAY_SECONDS if error.may_pass else REFUSED_SECONDS
                if now - away_since > patience:
                    raise _UnseenError(f"{error.status or 'no answer'}: {error}") from error
            except ComputeUnavailableError as error:
                raise _UnseenError(str(error)) from error
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - no two at once
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _watch_changes(self, cluster: AsyncCluster, version: str) -> Reason | None:
        """Return why a worker is needed; None if the watch has ended, and all is to be looked at anew."""
        query = {
            "labelSelector": self._watch.selector,
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_SECONDS),
            "allowWatchBookmarks": "true",
        }
        async with cluster.open("pods", query=query, silence=_SILENCE_SECONDS) as pieces:
            changes = _Changes(pieces)
            try:
                while True:
                    change = await changes.next(_LOOK_SECONDS)
                    if change is not None:
                        kind, pod = change["type"], change["object"]
                        if kind == "ERROR":  # such as 410 Gone: the version is too old
                            return None
                        if kind in ("ADDED", "MODIFIED"):
                            self._take(pod)
                        elif kind == "DELETED":
                            self._take(pod)
                            self._pods.pop(pod["metadata"]["name"], None)
                    reason = self._judge(cluster)
                    if reason is not None:
                        return reason
            except EOFError:
                return None
            finally:
                await changes.close()

    async def _take_over(self, cluster: AsyncCluster) -> None:
        if self._is_owner:
            return
        for name in self._pods:
            body = {"metadata": {"annotations": {OWNER: self._token}}}
            try:
                await cluster.ask("PATCH", f"pods/{name}", body=body)
            except ClusterError as error:
                if error.status != NOT_FOUND:
                    raise
        self._is_owner = True

    def _take(self, pod: Json) -> None:
        meta = pod["metadata"]
        name = meta["name"]
        if self._watch.pods.get(name) != meta["uid"]:
            return
        self._pods[name] = self._last[name] = pod
        if container_state(pod, STEP)[0] != "waiting":
            self._begun[name].set()

    def _judge(self, cluster: AsyncCluster) -> Reason | None:
        return judge(self._watch, self._pods, cluster.now(), self._errors)

    # ---- beside them -----------------------------------------------------------------------

    async def _follow(self, cluster: AsyncCluster, name: str) -> None:
        """Hand on a pod's log until its step has ended."""
        await self._begun[name].wait()
        log, pause = self._logs[name], _FIRST_PAUSE
        while True:
            try:
                query = log.open(follow=True)
                async with cluster.open(
                    f"pods/{name}/log", query=query, silence=_SILENCE_SECONDS
                ) as pieces:
                    async for data in pieces:
                        pause = _FIRST_PAUSE
                        began = time.monotonic()
                        log.feed(data)
                        # A log that comes thick and fast gets half of the loop's time at most.
                        await asyncio.sleep(time.monotonic() - began)
                if container_state(self._last[name], STEP)[0] == "terminated":
                    return
            except (ClusterError, ComputeUnavailableError):
                pass
            finally:
                log.close()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _keep_contact(self, cluster: AsyncCluster) -> None:
        """Let the pods' helpers know now and then that somebody will come: with files, or for what the step makes."""
        helper = STAGE if self._watch.awaits is Awaited.FILES else OUTPUTS_KEEPER
        while True:
            await asyncio.sleep(random.uniform(*_FIRST_CONTACT_SECONDS))  # noqa: S311 - no two at once
            for name in self._watch.pods:
                with suppress(ClusterError):
                    await cluster.execute(name, helper, ["touch", "control/contact"])
            await asyncio.sleep(_CONTACT_SECONDS)


async def remove_pods(watch: PodWatch, *, token: str) -> bool:
    """Have the pods deleted, with their Secret, Job and Service, if nobody has taken them over from who has this token.

    Returns:
        Whether there was anything to delete.

    Raises:
        ClusterError: The cluster does not answer.
        ComputeUnavailableError: No way to it is known here.
    """
    async with AsyncCluster(watch.access) as cluster:
        found = await cluster.ask("GET", "pods", query={"labelSelector": watch.selector})
        own = [
            pod
            for pod in found["items"]
            if belongs_to(pod, token)
            and watch.pods.get(pod["metadata"]["name"]) == pod["metadata"]["uid"]
        ]
        for pod in own:
            meta = pod["metadata"]
            await cluster.delete("pods", meta["name"], seconds=KILL_SECONDS, uid=meta["uid"])
        if own and watch.job is not None:
            await cluster.delete("jobs", watch.job, seconds=0)
            await cluster.delete("services", watch.job, seconds=0)
        if own and watch.secret is not None:
            await cluster.delete("secrets", watch.secret, seconds=0)
        return bool(own)


class _UnseenError(Exception):
    """The pods can't be watched from here."""


class _Changes:
    """What a watch tells, one change after the other, with a limit to waiting that breaks nothing."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""
        self._ready: list[bytes] = []
        self._reading: asyncio.Task[bytes] | None = None

    async def next(self, seconds: float) -> Json | None:
        """Return the next change; None if there was none for so many seconds.

        Raises:
            EOFError: The watch has ended.
            ClusterError: It broke.
        """
        while not self._ready:
            if self._reading is None:
                self._reading = asyncio.ensure_future(anext(self._pieces, b""))
            done, _ = await asyncio.wait([self._reading], timeout=seconds)
            if not done:
                return None
            data, self._reading = self._reading.result(), None
            if not data or len(self._rest) > _LARGEST_CHANGE:
                raise EOFError
            *self._ready, self._rest = (self._rest + data).split(b"\n")
        line = self._ready.pop(0)
        try:
            change: Json = json.loads(line)
        except ValueError as error:
            raise EOFError from error
        return change

    async def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
