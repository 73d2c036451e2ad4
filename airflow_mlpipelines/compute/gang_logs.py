"""The logs of several nodes, which threads read, as one log in the thread that runs the step."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from airflow_mlpipelines.compute.base import Emit

End = TypeVar("End")
_FULL = 1000
_POLL_SECONDS = 0.5
_TAIL_LINES = 50
_TAIL_CHARACTERS = 2000
_RETOLD_LINES = 25


class GangLogs(Generic[End]):
    """Watches every node in a thread of its own; lines and ends arrive in the thread that calls :meth:`follow`.

    So whatever Airflow raises in that thread (a timeout, an interrupt) meets no lock, and ``emit`` is
    called by no other.

    Attributes:
        ends: How each node ended, by its number, as far as it has.
        tails: The last lines of each node.
    """

    def __init__(self, watchers: Sequence[Callable[[Emit], End]], emit: Emit) -> None:
        """Begin to watch. A watcher hands on its node's log until the node has ended, and returns how it did."""
        self.ends: dict[int, End] = {}
        self.tails: list[deque[str]] = [deque(maxlen=_TAIL_LINES) for _ in watchers]
        self._emit = emit
        self._news: queue.Queue[tuple[int, str | End | BaseException]] = queue.Queue(_FULL)
        self._over = threading.Event()
        for node, watcher in enumerate(watchers):  # node 0 first, whose log people look at first
            threading.Thread(target=self._watch, args=(node, watcher), daemon=True).start()

    def follow(self, seconds: float | None = None) -> tuple[int, End] | None:
        """Hand on lines until a node ends; return its number and its end, or None if ``seconds`` were over first.

        Raises:
            BaseException: What its watcher has raised.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                node, news = self._news.get(timeout=left)
            except queue.Empty:
                return None
            if isinstance(news, BaseException):
                raise news
            if isinstance(news, str):
                self.tails[node].append(news[:_TAIL_CHARACTERS])
                self._emit(news)
                continue
            self.ends[node] = news
            return node, news

    def retell(self, culprit: int) -> None:
        """Hand on the ends of all nodes' logs once more, node by node from 0 on, and the culprit's last.

        Lines of different nodes have come as they were printed; now each node's are together.
        """
        others = [node for node in range(len(self.tails)) if node != culprit]
        for node in (*others, culprit):
            if not self.tails[node]:
                continue
            what = ", which failed" if node == culprit else ""
            self._emit(f"The end of the log of node {node} of {len(self.tails)}{what}:")
            for line in list(self.tails[node])[-_RETOLD_LINES:]:
                self._emit(f"  {line}")

    def close(self) -> None:
        """Hand nothing on any more."""
        self._over.set()

    def _watch(self, node: int, watcher: Callable[[Emit], End]) -> None:
        try:
            self._put(node, watcher(lambda line: self._put(node, line)))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that follows
            self._put(node, error)

    def _put(self, node: int, news: str | End | BaseException) -> None:
        while not self._over.is_set():
            try:
                self._news.put((node, news), timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return
