"""One build of an image at a time, over all machines that share the metadata database."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from airflow_mlpipelines.execution.heartbeat import LeaseHeldError, hold_lease

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.compute.base import BuildGuard, Emit

_LOOK_SECONDS = 1.0


def make_build_guard(index: MetadataIndex, holder: str) -> BuildGuard:
    """Return what keeps other machines from building the same image at once.

    A machine that was lost in the middle of a build is waited for until its lease has run out.

    Args:
        index: The metadata database.
        holder: Who is going to build, for people: the same for all tries of one task instance.
    """

    @contextmanager
    def guard(key: str, name: str, *, emit: Emit) -> Iterator[None]:
        with ExitStack() as stack:
            waited_for = None
            while True:
                try:
                    stack.enter_context(hold_lease(index, key, holder))
                    break
                except LeaseHeldError as error:
                    if waited_for != error.held.by:
                        waited_for = error.held.by
                        emit(f"Waiting for {waited_for}, which is building {name}")
                time.sleep(_LOOK_SECONDS)
            yield

    return guard
