"""What a step has begun to send to a place of others, kept on a datastore until all of it is there.

If the upload breaks off, and the program makes other files when it runs again, those that are there already are known as
its own, and not as somebody else's. They are known by their bytes: whoever has replaced one meanwhile has made it his.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.parts import THREADS
from airflow_mlpipelines.storage.trees import digest_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from airflow_mlpipelines.storage.stores import Store

_VERSION = 1


class UploadNote:
    """The files of one upload that has begun and not ended, by name: the digests of what was sent under it.

    Args:
        store: Where it is kept: any worker may have to go on.
        sender: Whose upload it is: the same for every try of a task.
        target: The address of the place.
    """

    def __init__(self, store: Store, sender: str, target: str) -> None:
        self._store = store
        self._path = f"uploads/{digest('upload-v1', [sender, target])}.json"
        self._sent: dict[str, list[str]] | None = None

    def has_sent(self, name: str, content: Callable[[], str]) -> bool:
        """Whether an earlier try may have sent a file, going by its name and its digest (64 hex digits).

        Args:
            name: The file's path below the place.
            content: Returns the digest. It is only asked for where something was sent under the name.
        """
        sent = self._load().get(name, [])
        return bool(sent) and content() in sent

    def add(self, files: Mapping[str, Path]) -> None:
        """Note files that are about to be sent.

        Raises:
            DataError: It can't be written.
        """
        sent = self._load()
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(lambda file: digest_file(bytes(file)).hex(), files.values())
            for name, content in zip(files, digests, strict=True):
                if content not in sent.setdefault(name, []):
                    sent[name].append(content)
        data = {"version": _VERSION, "files": sent}
        self._store.write_bytes(self._path, json.dumps(data).encode())

    def forget(self) -> None:
        """Delete it: all is there, and nobody has to go on."""
        if self._load():
            with suppress(DataError):  # it costs only room
                self._store.delete(self._path)

    def _load(self) -> dict[str, list[str]]:
        if self._sent is None:
            self._sent = {}
            with suppress(DataError, ValueError, KeyError, TypeError, AttributeError):
                if self._store.exists(self._path):
                    data = json.loads(self._store.read_bytes(self._path))
                    if data["version"] == _VERSION:
                        self._sent = {
                            str(name): [str(content) for content in contents]
                            for name, contents in data["files"].items()
                        }
        return self._sent
