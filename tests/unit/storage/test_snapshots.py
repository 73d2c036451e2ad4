from __future__ import annotations

import gzip
import io
import tarfile

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage import snapshots
from airflow_mlpipelines.storage.snapshots import (
    extract_archive,
    list_source_files,
    make_snapshot,
    unpack_snapshot,
)
from airflow_mlpipelines.storage.stores import open_store


@pytest.fixture
def source(tmp_path):
    """A source directory with what counts and what never does."""
    root = tmp_path / "source"
    for name in ("train.py", "lib/__init__.py", "data/words.txt", "notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in ("__pycache__/train.pyc", ".git/config", ".venv/bin/python", "lib/x.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("noise")
    (root / "train.py").chmod(0o755)
    return root


@pytest.fixture
def store(tmp_path):
    return open_store("store", f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "home"))


def test_noise_never_counts(source):
    assert list_source_files(source) == [
        "data/words.txt",
        "lib/__init__.py",
        "notes.md",
        "train.py",
    ]


def test_an_ignore_file_leaves_out_what_it_names(source):
    (source / ".gitignore").write_text("data/\n")
    assert "data/words.txt" not in list_source_files(source)

    (source / ".amlignore").write_text("*.md\n")  # the one that wins, as in Azure ML
    assert "data/words.txt" in list_source_files(source)
    assert "notes.md" not in list_source_files(source)


def test_a_snapshot_comes_back_as_it_was(source, store, tmp_path):
    snapshot = make_snapshot(source, store)

    unpack_snapshot(snapshot.digest, store, tmp_path / "unpacked")

    assert list_source_files(tmp_path / "unpacked") == list_source_files(source)
    assert (tmp_path / "unpacked/train.py").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "unpacked/notes.md").stat().st_mode & 0o777 == 0o644


def test_the_same_files_elsewhere_are_the_same_snapshot(source, store, tmp_path):
    first = make_snapshot(source, store)
    source.rename(tmp_path / "moved")

    assert make_snapshot(tmp_path / "moved", store) == first


def test_writing_to_an_unpacked_copy_leaves_the_next_one_alone(source, store, tmp_path):
    digest = make_snapshot(source, store).digest
    unpack_snapshot(digest, store, tmp_path / "one")
    (tmp_path / "one/train.py").write_text("changed")

    unpack_snapshot(digest, store, tmp_path / "two")

    assert (tmp_path / "two/train.py").read_text() == "train.py"


def test_a_directory_that_is_too_large_names_its_largest_files(source, store, monkeypatch):
    monkeypatch.setattr(snapshots, "MAX_BYTES", 10)

    with pytest.raises(DataError, match=r"largest files are .*words\.txt.*\.amlignore"):
        make_snapshot(source, store)


def test_a_gone_snapshot_is_an_error(store, tmp_path):
    with pytest.raises(DataError, match="can't be read"):
        unpack_snapshot("ab" * 32, store, tmp_path / "target")


def archive(*members):
    """Return a tar.gz of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for member in members:
            made.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def member(name, kind=tarfile.REGTYPE, link="", size=0):
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(archive(member("../out")), id="climbs out"),
        pytest.param(archive(member("/etc/cron.d/x")), id="absolute"),
        pytest.param(archive(member("a/../../out")), id="climbs out further down"),
        pytest.param(archive(member("link", tarfile.SYMTYPE, "/etc")), id="symbolic link"),
        pytest.param(archive(member("hard", tarfile.LNKTYPE, "/etc/passwd")), id="hard link"),
        pytest.param(archive(member("dev", tarfile.CHRTYPE)), id="device"),
        pytest.param(archive(member("pipe", tarfile.FIFOTYPE)), id="pipe"),
        pytest.param(archive(member("twice"), member("twice")), id="twice the same name"),
        pytest.param(archive(member("a", size=10))[:-20], id="cut short"),
        pytest.param(b"no archive at all", id="no archive"),
        pytest.param(gzip.compress(b"no tar"), id="compressed, no archive"),
    ],
)
def test_a_hostile_or_damaged_archive_is_refused(tmp_path, data):
    target = tmp_path / "target"
    target.mkdir()

    with pytest.raises(DataError):
        extract_archive(data, target)
    assert {path.name for path in tmp_path.iterdir()} <= {"target", "home"}


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "MAX_BYTES", 5)

    with pytest.raises(DataError, match="unpacks to over"):
        extract_archive(archive(member("a", size=10)), tmp_path)
