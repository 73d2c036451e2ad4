"""Doing the same for several containers or pods at once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")


def in_parallel(do: Callable[[Item], object], items: Sequence[Item]) -> None:
    """Call ``do`` for each item in a thread of its own, and return when all have.

    Raises:
        BaseException: What the first call that failed has raised, once all are over.
    """
    errors: list[BaseException] = []

    def call(item: Item) -> None:
        try:
            do(item)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=call, args=(item,), daemon=True) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
