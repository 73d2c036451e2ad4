"""What a transfer has brought to its destination so far, kept on a datastore between tries and runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from airflow_mlpipelines.storage.listing import RemoteFile
    from airflow_mlpipelines.storage.stores import Store

_VERSION = 1
Entry = tuple[str, str, str]
"""The source's version of a file, the destination's, and its digest (64 hex digits, or nothing)."""


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
        except (DataError, ValueError, KeyError, TypeError, AttributeError):
            self.entries = {}

    def save(self) -> None:
        """Write it, whole.

        Raises:
            DataError: It can't be written.
        """
        data = {"version": _VERSION, "files": self.entries}
        self._store.write_bytes(self._path, json.dumps(data).encode())

    def forget(self) -> None:
        """Delete it."""
        self.entries = {}
        self._store.delete(self._path)

    def note(self, source: RemoteFile, target: RemoteFile | None, content: str) -> None:
        """Note that a file has arrived, if both ends tell versions to know it by."""
        if target is not None and source.version is not None and target.version is not None:
            self.entries[source.path] = (_show(source), _show(target), content)

    def find(self, source: RemoteFile, target: RemoteFile | None) -> str | None:
        """Return the digest of a file that has arrived and is unchanged at both ends, else None."""
        entry = self.entries.get(source.path)
        if entry is None or target is None or source.size != target.size:
            return None
        return entry[2] if entry[:2] == (_show(source), _show(target)) else None


def _show(file: RemoteFile) -> str:
    return f"{file.version}:{file.size}"
