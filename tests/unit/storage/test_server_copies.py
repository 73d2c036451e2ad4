"""Waiting for a store that copies by itself. Azurite copies at once, so what Azure says meanwhile is said here."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from airflow_mlpipelines.exceptions import DataError, StoreError
from airflow_mlpipelines.storage import server_copies
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.stores import Store


class Client:
    """Azure's client of one blob, whose copy goes through these states, one at each look."""

    def __init__(self, states):
        self.states = iter(states)
        self.aborted = []

    async def get_blob_properties(self):
        status, progress = next(self.states)
        copy = SimpleNamespace(id="copy-1", status=status, progress=progress)
        copy.status_description = "500 the disk is full" if status == "failed" else None
        return SimpleNamespace(copy=copy)

    async def abort_copy(self, copy_id):
        self.aborted.append(copy_id)


class Filesystem:
    """As adlfs: its copy returns when the copy has begun."""

    def __init__(self, client):
        from fsspec.asyn import get_loop

        self.loop = get_loop()
        self.service_client = SimpleNamespace(get_blob_client=lambda *_: client)
        self.begun, self.removed = [], []

    def cp_file(self, source, target):
        self.begun.append((source, target))

    def rm_file(self, path):
        self.removed.append(path)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(server_copies, "_ASK_SECONDS", (0.0, 0.0))


def copy(states, check=lambda: None):
    """Copy a blob; return the client, the filesystem and what was told of its progress."""
    client = Client(states)
    filesystem = Filesystem(client)
    store = Store("lake", "abfs://c/team", filesystem=filesystem, root="c/team")
    told = []
    ends = open_end(store, "raw"), open_end(store, "copy")
    try:
        server_copies.copy_file(*ends, "model.bin", told.append, check)
    except BaseException as error:
        error.seen = client, filesystem, told
        raise
    return client, filesystem, told


def test_a_copy_is_over_when_azure_says_so_and_its_progress_is_told():
    states = [("pending", "0/9"), ("pending", "5/9"), ("pending", None), ("success", "9/9")]

    client, filesystem, told = copy(states)

    assert filesystem.begun == [("c/team/raw/model.bin", "c/team/copy/model.bin")]
    assert told == [0, 5]
    assert next(client.states, None) is None  # it was asked to the end
    assert (client.aborted, filesystem.removed) == ([], [])


@pytest.mark.parametrize("status", ["failed", "aborted"])
def test_a_copy_that_azure_gives_up_is_an_error_and_leaves_nothing(status):
    with pytest.raises(StoreError, match=f"the copy is '{status}'") as caught:
        copy([("pending", "5/9"), (status, "5/9"), (status, "5/9")])

    client, filesystem, _ = caught.value.seen
    assert filesystem.removed == ["c/team/copy/model.bin"]
    assert client.aborted == []
    if status == "failed":
        assert "500 the disk is full" in str(caught.value)


def test_a_transfer_that_is_stopped_ends_the_copy():
    asked = itertools.count()

    def check():
        if next(asked) == 2:
            raise DataError("stopped")

    with pytest.raises(DataError, match="stopped") as caught:
        copy(itertools.repeat(("pending", "5/9")), check)

    client, filesystem, _ = caught.value.seen
    assert client.aborted == ["copy-1"]
    assert filesystem.removed == ["c/team/copy/model.bin"]
