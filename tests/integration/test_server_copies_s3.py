"""Objects that an S3 server copies by itself: large ones in parts, with progress, and gone on with. On versitygw."""

from __future__ import annotations

import os
import threading

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage import progress, server_copies
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.parts import PART
from airflow_mlpipelines.storage.stores import open_store
from airflow_mlpipelines.storage.transfer import pin_external
from tests.integration.test_broken_transfers import (  # noqa: F401 - fixtures
    bucket,
    place,
    proxy,
    served,
    store,
    unfinished,
)

pytestmark = pytest.mark.s3

SIZE = 10 * PART + 1


@pytest.fixture
def copy(store, proxy, tmp_path, monkeypatch):  # noqa: F811
    """Copies ``raw`` to ``copy``, with other sizes of parts than for objects of hundreds of megabytes."""
    monkeypatch.setattr(server_copies, "_PART", PART)
    monkeypatch.setattr(server_copies, "_LARGE", 2 * PART)
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0.0)
    local = tmp_path / "raw"
    local.write_bytes(os.urandom(SIZE))
    headers = {"ContentType": "model/x", "Metadata": {"owner": "ml"}}
    store.filesystem.put_file(str(local), store.remote_path("raw"), **headers)
    proxy.heal()

    def copy(pin="version"):
        ends = open_end(store, "raw"), open_end(store, "copy")
        notes = open_store("notes", f"file://{tmp_path}/notes")
        artifact = pin_external(store, "raw", how=pin)
        lines, stop = [], threading.Event()
        journal = Journal(notes, ends[0].uri, ends[1].uri)
        blobs = BlobCache(tmp_path / "blobs")
        done = Transfer(artifact, *ends, journal, blobs, lines.append, stop).run()
        return done, lines

    copy.data = local.read_bytes
    return copy


def test_a_large_object_is_copied_in_parts_with_what_belongs_to_it(copy, store, bucket, proxy):  # noqa: F811
    _, lines = copy()

    assert proxy.up + proxy.down < PART  # none of it came here
    assert (bucket / "team/copy").read_bytes() == copy.data()
    head = store.filesystem.call_s3("head_object", Bucket=bucket.name, Key="team/copy")
    assert (head["ContentType"], head["Metadata"]) == ("model/x", {"owner": "ml"})
    assert unfinished(store) == []
    assert any("1 of 1 files, 80.0 MiB of 80.0 MiB" in line for line in lines)


def test_reading_what_has_arrived_is_told_of(copy, store):  # noqa: F811
    done, lines = copy(pin="content")

    assert done.digest == pin_external(store, "copy").digest
    assert any(line.endswith("/s read") and "80.0 MiB" in line for line in lines)


def test_a_copy_that_broke_off_goes_on_with_the_parts_that_are_there(
    copy,
    store,  # noqa: F811
    bucket,  # noqa: F811
    monkeypatch,
):
    real = server_copies.S3Parts.copy

    def watch(parts, part):
        if part.number >= 4:
            raise DataError("the line is down")
        real(parts, part)

    monkeypatch.setattr(server_copies.S3Parts, "copy", watch)
    with pytest.raises(DataError, match="the line is down"):
        copy()
    assert not store.exists("copy")
    (left,) = unfinished(store)
    there = store.filesystem.call_s3(
        "list_parts", Bucket=bucket.name, Key=left["Key"], UploadId=left["UploadId"]
    )["Parts"]
    monkeypatch.setattr(server_copies.S3Parts, "copy", real)
    assert 0 < len(there) <= 4

    again = []
    monkeypatch.setattr(
        server_copies.S3Parts, "copy", lambda parts, part: (again.append(part), real(parts, part))
    )
    copy()

    assert (bucket / "team/copy").read_bytes() == copy.data()
    assert len(again) == 11 - len(there)
    assert unfinished(store) == []


def test_a_copy_with_other_bytes_is_known_by_the_tags_that_the_store_tells(store, tmp_path):  # noqa: F811
    ends = open_end(store, "raw"), open_end(store, "copy")
    store.write_bytes("raw/a.txt", b"hello")
    store.write_bytes("copy/a.txt", b"hello")
    ours = ends[0].list().files["a.txt"]
    assert not server_copies.has_other_bytes(*ends, ours, ends[1].list().files["a.txt"])

    store.write_bytes("copy/a.txt", b"hellO")

    assert server_copies.has_other_bytes(*ends, ours, ends[1].list().files["a.txt"])
