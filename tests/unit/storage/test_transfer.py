from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stat_cache import StatCache
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import (
    commit_output,
    fetch,
    missing_artifacts,
    pin_external,
)


@pytest.fixture(params=["file", "memory"])
def stores(request, tmp_path):
    """One datastore of each kind."""
    url = f"file://{tmp_path}/store" if request.param == "file" else f"memory://{tmp_path.name}"
    return StoreSet([open_store("store", url)], "store")


@pytest.fixture
def blobs(tmp_path):
    return BlobCache(tmp_path / "blobs")


@pytest.fixture
def made(tmp_path):
    """A directory that a step made."""
    root = tmp_path / "made"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("hello")
    (root / "sub" / "b.txt").write_text("world")
    return root


def test_an_output_goes_to_the_store_and_comes_back(stores, blobs, made, tmp_path):
    artifact = commit_output(stores.default, "run/out", made, step_run="r1")

    place = fetch(artifact, stores, blobs=blobs, target=tmp_path / "target")

    assert (artifact.size, artifact.files, artifact.kind) == (10, 2, "dir")
    assert artifact.step_run == "r1"
    assert (place / "sub" / "b.txt").read_text() == "world"
    assert missing_artifacts([artifact], stores) == []


def test_a_file_is_an_output_as_well(stores, blobs, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"123")

    artifact = commit_output(stores.default, "run/model", tmp_path / "model.bin", step_run="r")

    assert artifact.kind == "file"
    assert fetch(artifact, stores, blobs=blobs, target=tmp_path / "t").read_bytes() == b"123"


def test_moved_data_have_the_same_digest(stores, made):
    first = commit_output(
        stores.default, "one", shutil.copytree(made, made.parent / "c1"), step_run="r"
    )
    second = commit_output(
        stores.default, "two", shutil.copytree(made, made.parent / "c2"), step_run="r"
    )

    assert first.digest == second.digest
    assert first.uri != second.uri


def modes(root):
    return {
        path.relative_to(root).as_posix(): stat.S_IMODE(path.lstat().st_mode)
        for path in sorted(root.rglob("*"))
        if not path.is_symlink()
    }


def test_nobody_may_write_to_the_files_of_an_output_on_a_file_store(tmp_path, made):
    store = open_store("store", f"file://{tmp_path}/store")
    theirs = tmp_path / "theirs.csv"
    theirs.write_text("somebody's data, by another name")
    (made / "run.sh").touch(0o775)
    (made / "here").symlink_to("a.txt")
    os.link(theirs, made / "theirs.csv")
    for path in (made / "sub", theirs, made / "a.txt", made / "sub" / "b.txt"):
        path.chmod(0o664 if path.is_file() else 0o775)
    known = StatCache(tmp_path / "stat.sqlite")

    commit_output(store, "run/out", made, step_run="r", cache=known)
    (tmp_path / "model").write_text("1")
    commit_output(store, "run/model", tmp_path / "model", step_run="r")

    assert modes(tmp_path / "store/run") == {
        "model": 0o444,
        "out": stat.S_IMODE((tmp_path / "store/run/out").stat().st_mode),
        "out/a.txt": 0o444,
        "out/run.sh": 0o555,
        "out/sub": 0o775,
        "out/sub/b.txt": 0o444,
        "out/theirs.csv": 0o664,
    }
    store.delete("run")  # as the cache does
    assert not (tmp_path / "store/run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
def test_who_gets_an_output_of_a_file_store_can_not_write_to_it(made):
    """As a step whose worker has an ordinary user: root may write anywhere."""
    with tempfile.TemporaryDirectory() as home:  # which that user may enter
        place, nobody = Path(home, "store"), 65534
        os.chmod(home, 0o755)
        place.mkdir()
        shutil.copytree(made, place / "made")
        for path in (place, *place.rglob("*")):
            os.chown(path, nobody, nobody)
        write = f"open({str(place / 'run/out/a.txt')!r}, 'w')"

        def as_nobody(program):
            return subprocess.run(
                ["/usr/bin/env", "python3", "-c", program],
                user=nobody,
                group=nobody,
                extra_groups=(),
                capture_output=True,
                text=True,
            )

        store = open_store("store", f"file://{place}")
        artifact = commit_output(store, "run/out", place / "made", step_run="r")

        assert "PermissionError" in as_nobody(write).stderr
        assert (place / "run/out/a.txt").read_text() == "hello"
        assert missing_artifacts([artifact], StoreSet([store], "store")) == []
        remove = f"import shutil; shutil.rmtree({str(place / 'run/out/sub')!r})"
        assert as_nobody(remove).returncode == 0  # directories keep their rights: what is old goes


@pytest.mark.parametrize(
    ("wanted", "message"), [(False, "is a directory, but was declared as a file"), (None, None)]
)
def test_the_declared_kind_counts(stores, made, wanted, message):
    if message is None:
        commit_output(stores.default, "x", made, step_run="r", expect_directory=wanted)
        return
    with pytest.raises(DataError, match=message):
        commit_output(stores.default, "x", made, step_run="r", expect_directory=wanted)


def test_an_output_that_was_not_made_says_so(stores, tmp_path):
    with pytest.raises(DataError, match="was not made"):
        commit_output(stores.default, "x", tmp_path / "nothing", step_run="r")


def test_lost_and_changed_data_are_noticed(stores, made, tmp_path):
    artifact = commit_output(stores.default, "run/out", made, step_run="r")
    stores.default.write_bytes("run/out/a.txt", b"longer than before")

    assert "has 23 bytes in 2 files, not 10 in 2" in missing_artifacts([artifact], stores)[0][1]

    stores.default.delete("run/out")
    assert missing_artifacts([artifact], stores)[0][1].endswith("is gone")
    with pytest.raises(DataError, match="is gone"):
        fetch(artifact, stores, blobs=BlobCache(tmp_path / "b"), target=tmp_path / "t")


def test_remote_data_with_other_bytes_are_never_handed_on(tmp_path, made):
    stores = StoreSet([open_store("store", f"memory://{tmp_path.name}")], "store")
    artifact = commit_output(stores.default, "run/out", made, step_run="r")
    stores.default.write_bytes("run/out/a.txt", b"hellO")

    with pytest.raises(DataError, match="they were changed or cut short"):
        fetch(artifact, stores, blobs=BlobCache(tmp_path / "b"), target=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_what_an_object_store_cannot_hold_is_refused(tmp_path):
    stores = StoreSet([open_store("store", f"memory://{tmp_path.name}")], "store")
    empty, linked = tmp_path / "e", tmp_path / "l"
    (empty / "nothing").mkdir(parents=True)
    linked.mkdir()
    (linked / "a").write_text("1")
    (linked / "b").symlink_to("a")

    with pytest.raises(DataError, match="empty directory 'nothing'"):
        commit_output(stores.default, "x", empty, step_run="r")
    with pytest.raises(DataError, match="symbolic link 'b'"):
        commit_output(stores.default, "y", linked, step_run="r")


class TestPinning:
    def test_nothing_there_is_no_error(self, stores):
        assert pin_external(stores.default, "raw.csv") is None

    def test_content_counts_and_place_does_not(self, stores):
        stores.default.write_bytes("raw.csv", b"1,2")
        stores.default.write_bytes("moved.csv", b"1,2")
        stores.default.write_bytes("other.csv", b"1,3")

        digests = [
            pin_external(stores.default, name).digest
            for name in ("raw.csv", "moved.csv", "other.csv")
        ]

        assert digests[0] == digests[1] != digests[2]

    def test_a_directory_is_pinned_as_a_whole(self, stores):
        stores.default.write_bytes("raw/a.csv", b"1")
        before = pin_external(stores.default, "raw")
        stores.default.write_bytes("raw/b.csv", b"2")

        after = pin_external(stores.default, "raw")

        assert (before.files, after.files, after.kind) == (1, 2, "dir")
        assert before.digest != after.digest

    def test_files_of_one_time_and_one_size_have_versions_of_their_own(self, tmp_path):
        store = open_store("store", f"file://{tmp_path}")
        for name in ("a", "b", "one/x", "two/x"):
            store.write_bytes(name, b"1")
            os.utime(tmp_path / name, (10**9, 10**9))

        versions = {
            pin_external(store, name, how="version").digest for name in ("a", "b", "one", "two")
        }

        assert len(versions) == 4

    def test_the_store_s_version_may_stand_for_the_content(self, stores):
        stores.default.write_bytes("raw.csv", b"1")

        artifact = pin_external(stores.default, "raw.csv", how="version")

        assert artifact.digest.startswith("version:")
        assert pin_external(stores.default, "raw.csv", how="version") == artifact
