"""Processes of this machine: recognised without doubt, found by what they descend from, ended.

Reads ``/proc``. On systems without it nothing is found, and only process groups can be signalled.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROC = Path("/proc")
_AFTER_NAME_PARENT = 1
_AFTER_NAME_START = 19
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.02


@cache
def machine_identity() -> str:
    """Return what two processes have in common exactly if a process id means the same to both."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text().strip())
        parts.append((_PROC / "self/ns/pid").readlink().name)
    return "/".join(parts)


def start_time(pid: int) -> int | None:
    """Return when the process started, in the kernel's own ticks; None if there is none such.

    A process id is given out again one day; a process id with its start time is not.
    """
    fields = _stat(str(pid))
    return int(fields[_AFTER_NAME_START]) if fields else None


def descendants(root: int) -> list[int]:
    """Return the ids of all processes below ``root``, parents before their children."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields:
            children.setdefault(int(fields[_AFTER_NAME_PARENT]), []).append(int(pid))
    found: list[int] = []
    level = [root]
    while level:
        level = [child for parent in level for child in children.get(parent, ())]
        found += level
    return found


def end_process(pid: int, started: int, *, seconds: float) -> bool:
    """Ask one process to end, and wait; return whether it is gone.

    Never hits another process that got the same id since.
    """
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):  # gone, or a system without such handles
        return start_time(pid) != started
    try:
        # The handle was opened first: if the start time is right now, the handle is for that process.
        if start_time(pid) != started:
            return True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGTERM)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(handle)


def kill_marked(variable: str, value: str, *, seconds: float = _KILL_SECONDS) -> list[int]:
    """Kill every process that was started with this environment variable; return those that go on."""
    deadline = time.monotonic() + seconds
    while True:
        alive = list(_marked(f"{variable}={value}".encode()))
        if not alive or time.monotonic() > deadline:
            return alive
        for pid in alive:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _marked(marker: bytes) -> Iterator[int]:
    own = os.getpid()
    for pid in _pids():
        # Of a process that has ended, or is another user's, nothing can be read.
        with suppress(OSError):
            if marker in (_PROC / pid / "environ").read_bytes().split(b"\0") and int(pid) != own:
                yield int(pid)


def _pids() -> list[str]:
    try:
        return [name for name in os.listdir(_PROC) if name.isdecimal()]  # noqa: PTH208 - ten times faster
    except FileNotFoundError:
        return []


def _stat(pid: str) -> list[str] | None:
    """Return the fields of ``/proc/<pid>/stat`` after the name, which may hold anything."""
    try:
        text = (_PROC / pid / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
