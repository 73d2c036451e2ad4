"""Files uploaded to places that others write to: what two that do so at once, and a second try, leave there."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.stores import open_store
from airflow_mlpipelines.storage.upload_notes import UploadNote
from airflow_mlpipelines.storage.uploads import upload_files

HALF = 100_000
LARGE = (8 << 20) + 5  # more than is compared at a time


@pytest.fixture
def local(tmp_path):
    return open_store("lake", (tmp_path / "lake").as_uri())


@pytest.fixture
def remote(tmp_path):
    store = open_store("lake", f"memory://{tmp_path.name}")
    yield store
    store.delete("")


def make(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_two_that_upload_one_file_at_once_leave_one_of_them_whole(local, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=60)

    def copy_in_halves(source, target):
        data = source.read_bytes()
        with open(target, "wb") as file:
            file.write(data[:HALF])
            file.flush()
            both.wait()
            file.write(data[HALF:])
        both.wait()

    monkeypatch.setattr(shutil, "copyfile", copy_in_halves)
    contents = [b"a" * 2 * HALF, b"b" * 3 * HALF]
    sources = [make(tmp_path / f"made-{n}", model=data) for n, data in enumerate(contents)]

    def send(source):
        return upload_files(local, "place", source, overwrite=True, step_run="r")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send, sources))

    place = local.local_path("place")
    assert (place / "model").read_bytes() in contents
    assert [file.name for file in place.iterdir()] == ["model"]


def test_two_that_write_one_file_of_a_remote_store_at_once_do_not_mix(remote):
    with ExitStack() as publishing:
        first, second = (publishing.enter_context(remote.publish("place/model")) for _ in range(2))
        remote.filesystem.pipe_file(first, b"one")
        remote.filesystem.pipe_file(second, b"other")

    assert remote.read_bytes("place/model") == b"one"  # which was published last
    assert remote.filesystem.ls(remote.remote_path("place"), detail=False) == [
        remote.remote_path("place/model")
    ]


def test_an_upload_that_fails_leaves_no_part_of_a_file(local, tmp_path):
    (local.local_path("place") / "model" / "theirs").mkdir(parents=True)
    source = make(tmp_path / "made", model=b"ours")

    with pytest.raises(DataError, match="can't be written"):
        upload_files(local, "place", source, overwrite=True, step_run="r")

    assert [file.name for file in local.local_path("place").iterdir()] == ["model"]


def test_a_file_may_have_the_longest_name_there_is(local, tmp_path):
    name = "ü" * 127
    source = make(tmp_path / "made", **{name: b"1"})

    upload_files(local, "place", source, overwrite=False, step_run="r")

    assert (local.local_path("place") / name).read_bytes() == b"1"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_second_try_finds_what_the_first_has_sent_and_sends_only_the_rest(
    request, tmp_path, kind
):
    store = request.getfixturevalue(kind)
    source = make(tmp_path / "made", model=b"x" * LARGE, empty=b"")
    first = upload_files(store, "place", source, overwrite=False, step_run="r")

    # The version is made of the times of the files: nothing has been written again.
    assert upload_files(store, "place", source, overwrite=False, step_run="r") == first

    make(source, more=b"1")
    assert upload_files(store, "place", source, overwrite=False, step_run="r").files == 3
    assert store.read_bytes("place/more") == b"1"


@pytest.fixture
def broken_off(request, tmp_path, kind, monkeypatch):
    """A store to which a first try has sent three of five files, and what makes the notes of a sender."""
    store = request.getfixturevalue(kind)
    notes = open_store("home", (tmp_path / "home").as_uri())

    def note(sender="dag/run/task[-1]"):
        return UploadNote(notes, sender, store.uri("place"))

    sent = threading.BoundedSemaphore(3)
    module, name = (shutil, "copyfile") if kind == "local" else (store.filesystem, "put_file")
    real = getattr(module, name)

    def send(*words):
        if not sent.acquire(blocking=False):
            raise OSError("unplugged")
        return real(*words)

    source = make(tmp_path / "first", **{name: b"first " + name.encode() for name in "abcde"})
    with monkeypatch.context() as patched:
        patched.setattr(module, name, send)
        with pytest.raises(DataError, match="unplugged"):
            upload_files(store, "place", source, overwrite=False, step_run="r", note=note())
    return store, note


def names(store):
    return [
        name
        for name in "abcde"
        if store.exists(f"place/{name}") and store.read_bytes(f"place/{name}")
    ]


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_try_that_makes_other_files_replaces_what_an_earlier_one_has_sent(broken_off, tmp_path):
    store, note = broken_off
    there = names(store)
    assert len(there) == 3
    second = make(tmp_path / "second", **{name: b"second " + name.encode() for name in "abcde"})

    with pytest.raises(DataError, match="already, with other content"):  # of another run
        upload_files(
            store, "place", second, overwrite=False, step_run="r", note=note("dag/other/task[-1]")
        )
    assert all(store.read_bytes(f"place/{name}").startswith(b"first") for name in there)
    upload_files(store, "place", second, overwrite=False, step_run="r", note=note())

    assert [store.read_bytes(f"place/{name}") for name in "abcde"] == [
        b"second " + name.encode() for name in "abcde"
    ]


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_what_somebody_has_put_there_since_is_his(broken_off, tmp_path):
    store, note = broken_off
    taken = names(store)[0]
    store.write_bytes(f"place/{taken}", b"theirs!")
    second = make(tmp_path / "second", **{name: b"second " + name.encode() for name in "abcde"})

    with pytest.raises(DataError, match=rf"holds \['{taken}'\] already") as caught:
        upload_files(store, "place", second, overwrite=False, step_run="r", note=note())

    assert not caught.value.retryable
    assert store.read_bytes(f"place/{taken}") == b"theirs!"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_other_bytes_of_the_same_length_are_told_and_kept(request, tmp_path, kind):
    store = request.getfixturevalue(kind)
    theirs = b"x" * (LARGE - 1) + b"y"
    store.write_bytes("place/model", theirs)
    source = make(tmp_path / "made", model=b"x" * LARGE, other=b"1")

    with pytest.raises(DataError, match=r"holds \['model'\] already, with other content") as caught:
        upload_files(store, "place", source, overwrite=False, step_run="r")

    assert not caught.value.retryable
    assert store.read_bytes("place/model") == theirs
    assert not store.exists("place/other")

    upload_files(store, "place", source, overwrite=True, step_run="r")
    assert store.read_bytes("place/model") == b"x" * LARGE
