"""A step's timeout on computes that keep none themselves."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_PAUSE = 1.0


def enforce_timeout(
    seconds: float | None,
    over: threading.Event,
    *,
    find_start: Callable[[], str | None],
    end: Callable[[], None],
) -> None:
    """Have a program ended when its time is up, by a thread of its own.

    Args:
        seconds: Its timeout, counted from its start, also if another try has begun it; None for none.
        over: Set when it has ended by itself, or is no longer to be ended.
        find_start: Returns when it began, as ISO 8601, or None where that is not known: then from now on.
        end: Ends it. Called again after a moment if it raises: the compute may be away for now.
    """
    if seconds is None:
        return
    arguments = (seconds, over, find_start, end)
    threading.Thread(target=_enforce, args=arguments, daemon=True).start()


def _enforce(
    seconds: float,
    over: threading.Event,
    find_start: Callable[[], str | None],
    end: Callable[[], None],
) -> None:
    if over.wait(_find_rest(seconds, find_start)):
        return
    while not over.is_set():
        try:
            end()
        except Exception as error:  # noqa: BLE001 - whatever it is, the program still runs
            log.debug("A program whose time is up could not be ended: %s", error)
            over.wait(_PAUSE)
        else:
            return


def _find_rest(seconds: float, find_start: Callable[[], str | None]) -> float:
    """Return how long a program may still run; never more than its timeout, whatever the clocks say."""
    try:
        began = find_start()
        gone = (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds() if began else 0.0
    except Exception as error:  # noqa: BLE001 - its time runs in any case
        log.debug("When a program began is not known: %s", error)
        return seconds
    return min(max(seconds - gone, 0.0), seconds)
