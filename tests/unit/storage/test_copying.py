"""Transfers between datastores: verified, resumed, whole."""

from __future__ import annotations

import os
import threading

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage import copying, progress
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.progress import Progress
from airflow_mlpipelines.storage.sending import Sender
from airflow_mlpipelines.storage.stores import open_store
from airflow_mlpipelines.storage.transfer import pin_external
from airflow_mlpipelines.storage.trees import digest_tree

FILES = {"a.txt": b"hello", "sub/b.txt": b"world", "sub/deep/c": b"", "large": b"x" * (9 << 20)}


def open_kind(kind, name, tmp_path):
    url = f"file://{tmp_path}/{name}" if kind == "file" else f"memory://{tmp_path.name}-{name}"
    return open_store(name, url)


def put(store, path, data):
    if store.is_local:
        store.write_bytes(path, data)
    else:
        store.filesystem.makedirs(store.remote_path(path).rpartition("/")[0], exist_ok=True)
        store.write_bytes(path, data)


class Job:
    """A transfer of ``raw`` on one datastore to ``copy`` on another."""

    def __init__(self, tmp_path, kinds=("file", "memory"), files=FILES):
        self.tmp_path = tmp_path
        self.source, self.target = (
            open_kind(kind, name, tmp_path)
            for kind, name in zip(kinds, ("from", "to"), strict=True)
        )
        for name, data in files.items():
            put(self.source, f"raw/{name}", data)
        self.lines = []
        self.stop = threading.Event()

    def run(self, pin="content", source="raw", target="copy", **options):
        self.lines.clear()
        ends = open_end(self.source, source), open_end(self.target, target)
        artifact = options.pop("artifact", None) or pin_external(self.source, source, how=pin)
        journal = Journal(open_kind("file", "notes", self.tmp_path), ends[0].uri, ends[1].uri)
        blobs = BlobCache(self.tmp_path / "blobs")
        return Transfer(
            artifact, *ends, journal, blobs, self.lines.append, self.stop, **options
        ).run()

    def there(self):
        """Return what is at the target."""
        listing = open_end(self.target, "copy").list()
        return {name: self.target.read_bytes(f"copy/{name}") for name in listing.files}

    def count_sent(self, monkeypatch):
        """Return a list that grows by every file that is sent from now on."""
        sent = []
        watch_sending(monkeypatch, sent.append)
        return sent


def watch_sending(monkeypatch, tell):
    """Tell the name of each file before it is sent."""

    def watch(real):
        def send(sender, file, *rest):
            tell(file.path)
            return real(sender, file, *rest)

        return send

    for way in ("_stream", "_copy"):
        monkeypatch.setattr(Sender, way, watch(getattr(Sender, way)))


KINDS = [(a, b) for a in ("file", "memory") for b in ("file", "memory")]


@pytest.fixture(params=KINDS, ids="-".join)
def job(request, tmp_path):
    return Job(tmp_path, request.param)


@pytest.mark.parametrize("pin", ["content", "version"])
def test_a_tree_arrives_bit_by_bit_and_is_known_by_its_digest(job, tmp_path, pin):
    local = Job(tmp_path / "same", ("file", "file")).source.local_path("raw")

    done = job.run(pin)

    assert job.there() == FILES
    assert (done.size, done.files, done.kind) == (10 + (9 << 20), 4, "dir")
    if done.digest.startswith("version:"):  # nobody has read them: the store has copied them
        assert (job.source.is_local, job.target.is_local, pin) == (False, False, "version")
    else:
        assert done.digest == digest_tree(local).digest


def test_a_file_arrives_as_a_file(job):
    done = job.run(source="raw/a.txt")

    assert (done.kind, done.files, done.size) == ("file", 1, 5)
    assert done.digest == pin_external(job.source, "raw/a.txt").digest
    assert job.target.read_bytes("copy") == b"hello"


def test_what_is_there_already_is_not_sent_again(job, monkeypatch):
    first = job.run()
    sent = job.count_sent(monkeypatch)

    assert job.run() == first
    assert sent == []
    assert "4 are there already, 0 are" in job.lines[0]

    put(job.source, "raw/a.txt", b"HELLO")
    assert job.run().digest == pin_external(job.source, "raw").digest != first.digest
    assert sent == ["a.txt"]


def test_what_others_have_changed_there_is_sent_again(job, monkeypatch):
    first = job.run()
    sent = job.count_sent(monkeypatch)
    put(job.target, "copy/a.txt", b"HELLO")

    assert job.run() == first
    assert sent == ["a.txt"]
    assert job.there() == FILES


def test_a_transfer_that_broke_off_goes_on_where_it_was(job, monkeypatch):
    monkeypatch.setattr(copying, "THREADS", 1)

    def fail(name):
        if name == "sub/b.txt":
            raise OSError("the line is down")

    watch_sending(monkeypatch, fail)
    with pytest.raises(OSError, match="the line is down"):
        job.run()
    arrived = set(job.there())
    monkeypatch.undo()
    sent = job.count_sent(monkeypatch)

    done = job.run()

    assert 0 < len(arrived) < len(FILES)
    assert set(sent) == FILES.keys() - arrived
    assert job.there() == FILES
    assert done.digest == pin_external(job.source, "raw").digest


@pytest.mark.parametrize("kinds", [("file", "memory"), ("memory", "file"), ("file", "file")])
def test_a_file_that_breaks_off_in_the_middle_is_not_there(tmp_path, kinds, monkeypatch):
    job = Job(tmp_path, kinds, {"large": b"x" * (20 << 20)})
    monkeypatch.setattr(Progress, "add", lambda *_, size=0, files=0: job.stop.set())

    with pytest.raises(DataError, match="was stopped"):
        job.run()

    assert job.there() == {}


def test_a_source_that_is_not_what_the_run_found_is_an_error(job):
    for pin in ("content", "version"):
        artifact = pin_external(job.source, "raw", how=pin)
        put(job.source, "raw/a.txt", b"HELLO" if pin == "content" else b"Hello")

        with pytest.raises(DataError, match="was changed after this run had looked it up") as no:
            job.run(artifact=artifact)
        assert no.value.retryable == (pin == "content")


def test_files_that_the_source_lacks_are_deleted_only_if_asked_for(job, monkeypatch):
    put(job.target, "copy/mine.txt", b"mine")
    sent = job.count_sent(monkeypatch)

    with pytest.raises(DataError, match=r"1 files that the source lacks, such as 'mine.txt'") as no:
        job.run()
    assert not no.value.retryable
    assert sent == []
    assert job.there() == {"mine.txt": b"mine"}

    job.run(replace=True)
    assert job.there() == FILES


def test_a_directory_does_not_go_where_a_file_is(job):
    put(job.target, "copy", b"a file")

    with pytest.raises(DataError, match="is a file already, and the source is a directory") as no:
        job.run()
    assert not no.value.retryable


def test_links_and_empty_directories_go_to_directories_and_nowhere_else(tmp_path):
    jobs = {kind: Job(tmp_path / kind, ("file", kind)) for kind in ("file", "memory")}
    for job in jobs.values():
        root = job.source.local_path("raw")
        (root / "hollow").mkdir()
        os.symlink("a.txt", root / "link")

    done = jobs["file"].run()
    assert done.digest == digest_tree(jobs["file"].target.local_path("copy")).digest
    assert done.files == 5
    with pytest.raises(DataError, match="the symbolic link 'link', which datastore 'to'") as no:
        jobs["memory"].run()
    assert not no.value.retryable


def test_it_says_how_far_it_is(job, monkeypatch):
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0.0)

    job.run()

    assert "4 files, 9.0 MiB" in job.lines[0]
    assert any("of 4 files, 9.0 MiB of 9.0 MiB" in line for line in job.lines)
    assert any("4 files sent in" in line for line in job.lines)


def test_a_damaged_journal_is_an_empty_one(job):
    job.run()
    (journal,) = (job.tmp_path / "notes" / "transfers").iterdir()
    journal.write_text('{"version": 1, "files": {"a.txt": 7}}')

    job.run()

    assert job.there() == FILES


@pytest.mark.parametrize("kinds", KINDS[:3])  # a store that copies by itself notes no digests
def test_a_wrong_journal_is_found_out_by_the_digest(tmp_path, kinds):
    job = Job(tmp_path, kinds)
    job.run()
    (journal,) = (job.tmp_path / "notes" / "transfers").iterdir()
    hello = digest_tree(_write(job.tmp_path / "w", b"hello")).digest.removeprefix("blake3:")
    assert hello in journal.read_text()
    journal.write_text(journal.read_text().replace(hello, "0" * 64))

    assert job.run().digest == pin_external(job.source, "raw").digest
    assert "What is there is not what the source was: all of it is sent anew." in job.lines


def _write(path, data):
    path.write_bytes(data)
    return path
