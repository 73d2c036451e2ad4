"""What a transfer has brought to its destination so far, kept on a datastore between tries and runs."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.stores import Store

_VERSION = 1
Entry = tuple[str, str, str]
"""The source's version of a file, the destination's, and its digest (64 hex digits, or nothing)."""
Begun = tuple[str, int, str]
"""The source's version of a large file, the size of its parts, and the token by which the target knows it again."""


class Journal:
    """The files that have arrived, by name. What can't be read is taken for empty.

    Args:
        store: Where it is kept: any worker may have to go on.
        source: The address of the source.
        target: That of the destination.
    """

    def __init__(self, store: Store, source: str, target: str) -> None:
        self._store = store
        self._path = f"transfers/{digest('transfer-v1', [source, target])}.json"
        self.entries: dict[str, Entry] = {}
        self._begun: dict[str, Begun] = {}
        self._lock = threading.RLock()

    def load(self) -> None:
        """Read what earlier tries noted."""
        try:
            if not self._store.exists(self._path):
                return
            data = json.loads(self._store.read_bytes(self._path))
            if data["version"] == _VERSION:
                self.entries = {
                    str(name): (str(source), str(target), str(content))
                    for name, (source, target, content) in data["files"].items()
                }
                self._begun = {
                    str(name): (str(source), int(part_size), str(token))
                    for name, (source, part_size, token) in data.get("begun", {}).items()
                }
        except (DataError, ValueError, KeyError, TypeError, AttributeError):
            self.entries, self._begun = {}, {}

    @property
    def is_empty(self) -> bool:
        """Whether no earlier try is known to have brought anything."""
        return not self.entries and not self._begun

    def clear(self) -> None:
        """Believe nothing of what earlier tries noted."""
        with self._lock:
            self.entries, self._begun = {}, {}

    def save(self) -> None:
        """Write it, whole.

        Raises:
            DataError: It can't be written.
        """
        with self._lock:
            data = {"version": _VERSION, "files": self.entries, "begun": self._begun}
            self._store.write_bytes(self._path, json.dumps(data).encode())

    def forget(self) -> None:
        """Delete it."""
        self.clear()
        self._store.delete(self._path)

    def note(self, source: RemoteFile, target: RemoteFile | None, content: str) -> None:
        """Note that a file has arrived, if both ends tell versions to know it by."""
        if target is not None and source.version is not None and target.version is not None:
            with self._lock:
                self.entries[source.path] = (_show(source), _show(target), content)
                self._begun.pop(source.path, None)

    def note_begun(self, source: RemoteFile, part_size: int, token: str) -> None:
        """Note that a large file is on its way in parts, and write that.

        Raises:
            DataError: It can't be written.
        """
        entry = (_show(source), part_size, token)
        with self._lock:
            if self._begun.get(source.path) != entry:
                self._begun[source.path] = entry
                self.save()

    def find_begun(self, source: RemoteFile, part_size: int) -> tuple[str | None, str | None]:
        """Return the token of a large file that is on its way, and of one of another version that was."""
        with self._lock:
            entry = self._begun.get(source.path)
        if entry is None:
            return None, None
        is_same = source.version is not None and entry[:2] == (_show(source), part_size)
        return (entry[2], None) if is_same else (None, entry[2])

    def find(self, source: RemoteFile, target: RemoteFile | None) -> str | None:
        """Return the digest of a file that has arrived and is unchanged at both ends, else None."""
        entry = self.entries.get(source.path)
        if entry is None or target is None or source.size != target.size:
            return None
        return entry[2] if entry[:2] == (_show(source), _show(target)) else None


def _show(file: RemoteFile) -> str:
    return f"{file.version}:{file.size}"
