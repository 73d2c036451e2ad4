"""Files that are locked (``flock``) by whoever has them open, and say in JSON who that is."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SHARED_FILE = 0o666


def lock_file(path: Path) -> int | None:
    """Return the file, open and locked; None if somebody else has locked it."""
    while True:
        file = _open(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have removed it meanwhile: then what was locked is nothing that others see.
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: Path) -> int:
    try:
        # First without: of another user's file in /tmp the kernel refuses it with O_CREAT.
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        with suppress(OSError):  # others may share the directory, whatever this worker's umask is
            os.fchmod(file, _SHARED_FILE)
        return file


def write_facts(file: int, facts: Mapping[str, object]) -> None:
    """Replace what a file says."""
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(facts).encode(), 0)


def read_facts(path: Path) -> dict[str, object]:
    """Return what a file says; nothing if it is not there, or says nothing that can be read."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
