from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage import trees
from airflow_mlpipelines.storage.stat_cache import StatCache
from airflow_mlpipelines.storage.trees import digest_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534


@pytest.fixture
def tree(tmp_path):
    """A directory with a file, an empty directory and a link inside."""
    root = tmp_path / "tree"
    (root / "empty").mkdir(parents=True)
    (root / "a.txt").write_text("hello")
    (root / "link").symlink_to("a.txt")
    return root


def age(path: Path) -> None:
    """Let a file look old enough for the stat cache to trust it."""
    old = time.time() - 3600
    os.utime(path, (old, old))


class OldClock:
    """A clock far ahead, so that files just written count as old."""

    @staticmethod
    def time_ns() -> int:
        return time.time_ns() + 3_600_000_000_000


def test_a_file_has_the_plain_digest_of_its_bytes(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(b"x" * 1000)

    found = digest_tree(path)

    assert found.digest == f"blake3:{blake3(b'x' * 1000).hexdigest()}"
    assert (found.size, found.files, found.kind) == (1000, 1, "file")


def test_a_large_file_has_the_same_digest_through_the_memory_map(tmp_path, monkeypatch):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(1 << 20))
    plain = digest_tree(path)

    monkeypatch.setattr(trees, "_LARGE", 1)

    assert digest_tree(path) == plain


def test_the_digest_of_a_tree_is_golden(tree):
    assert digest_tree(tree).digest == GOLDEN
    assert digest_tree(tree).files == 2


GOLDEN = "blake3:60b08bf1c0c92aba29e3a04919440ec42754887550d3e14df72aa0e1432e1a5a"


def test_a_copy_elsewhere_has_the_same_digest(tree, tmp_path):
    copy = tmp_path / "somewhere" / "else"
    shutil.copytree(tree, copy, symlinks=True)
    (copy / "a.txt").chmod(0o600)

    assert digest_tree(copy) == digest_tree(tree)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a.txt").write_text("hellO"),
        lambda root: (root / "a.txt").rename(root / "b.txt"),
        lambda root: (root / "empty").rmdir(),
        lambda root: (root / "more").mkdir(),
        lambda root: ((root / "link").unlink(), (root / "link").symlink_to("empty")),
        lambda root: ((root / "link").unlink(), shutil.copy(root / "a.txt", root / "link")),
    ],
)
def test_whatever_a_program_could_notice_changes_the_digest(tree, change):
    before = digest_tree(tree)

    change(tree)

    assert digest_tree(tree).digest != before.digest


@pytest.mark.parametrize("target", ["../outside.txt", "/etc/passwd"])
def test_a_link_that_leads_out_is_refused(tree, target):
    (tree / "out").symlink_to(target)

    with pytest.raises(DataError, match=r"out.*leads out of its directory"):
        digest_tree(tree)


def test_a_pipe_is_refused(tree):
    os.mkfifo(tree / "pipe")

    with pytest.raises(DataError, match=r"pipe.*can't be digested"):
        digest_tree(tree)


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        digest_tree(tmp_path / "nowhere")


@contextmanager
def not_root() -> Iterator[None]:
    """Act as a user who may not read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unreadable_file_is_named():
    # Not below pytest's own directory, which nobody else may enter.
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        file = Path(made) / "a.txt"
        file.write_text("hello")
        file.chmod(0)

        with not_root(), pytest.raises(DataError, match=r"a\.txt.*Permission denied"):
            digest_tree(Path(made))


def test_a_file_that_cannot_be_opened_is_named(tree, monkeypatch):
    def refuse(path: bytes, size: int) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(trees, "_read", refuse)

    with pytest.raises(DataError, match=r"a\.txt.*Permission denied"):
        digest_tree(tree)


def test_names_in_any_encoding_are_told_apart(tmp_path):
    root = os.fsencode(tmp_path / "names")
    os.mkdir(root)
    digests = set()
    for name in (b"caf\xe9", "café".encode(), "cafe\u0301".encode()):
        with open(os.path.join(root, name), "wb"):
            pass
        digests.add(digest_tree(tmp_path / "names").digest)
        os.unlink(os.path.join(root, name))

    assert len(digests) == 3


def test_a_file_that_never_holds_still_is_refused(tree, monkeypatch):
    real = trees._read

    def read_while_it_grows(path: bytes, size: int) -> bytes:
        with open(path, "ab") as file:
            file.write(b"more")
        return real(path, size)

    monkeypatch.setattr(trees, "_read", read_while_it_grows)

    with pytest.raises(DataError, match=r"a\.txt.*changes while it is read"):
        digest_tree(tree)


@settings(max_examples=25, deadline=None)
@given(
    files=st.dictionaries(
        st.text("abc", min_size=1, max_size=3), st.binary(max_size=8), min_size=1, max_size=4
    ),
    data=st.data(),
)
def test_one_byte_more_changes_the_digest(files, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for name, content in files.items():
        (root / name).write_bytes(content)
    before = digest_tree(root).digest
    chosen = data.draw(st.sampled_from(sorted(files)))

    (root / chosen).write_bytes(files[chosen] + b"\0")

    assert digest_tree(root).digest != before


class TestStatCache:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr("airflow_mlpipelines.storage.stat_cache.time", OldClock)
        return StatCache(tmp_path / "cache.db")

    @pytest.fixture
    def reads(self, monkeypatch):
        """The files that were really read."""
        seen: list[bytes] = []
        real = trees._read

        def read(path: bytes, size: int) -> bytes:
            seen.append(os.path.basename(path))
            return real(path, size)

        monkeypatch.setattr(trees, "_read", read)
        return seen

    def test_an_unchanged_file_is_not_read_again(self, tree, cache, reads):
        first = digest_tree(tree, cache=cache)
        reads.clear()

        assert digest_tree(tree, cache=cache) == first
        assert reads == []

    def test_another_process_knows_it_too(self, tree, cache, reads, tmp_path):
        digest_tree(tree, cache=cache)
        reads.clear()

        digest_tree(tree, cache=StatCache(tmp_path / "cache.db"))

        assert reads == []

    def test_other_bytes_of_the_same_size_and_time_are_noticed(self, tree, cache):
        first = digest_tree(tree, cache=cache)
        before = (tree / "a.txt").stat()
        (tree / "a.txt").write_text("HELLO")
        os.utime(tree / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))

        assert digest_tree(tree, cache=cache).digest != first.digest

    def test_a_file_put_in_its_place_is_noticed(self, tree, cache):
        first = digest_tree(tree, cache=cache)
        (tree / "new").write_text("HELLO")
        age(tree / "new")
        (tree / "new").replace(tree / "a.txt")

        assert digest_tree(tree, cache=cache).digest != first.digest

    def test_a_fresh_file_is_never_trusted(self, tree, tmp_path, reads):
        cache = StatCache(tmp_path / "fresh.db")
        digest_tree(tree, cache=cache)
        reads.clear()

        digest_tree(tree, cache=cache)

        assert reads == [b"a.txt"]

    def test_a_damaged_cache_costs_time_and_nothing_else(self, tree, tmp_path, reads):
        (tmp_path / "cache.db").write_bytes(b"this is no database" * 100)
        first = digest_tree(tree, cache=StatCache(tmp_path / "cache.db"))

        assert digest_tree(tree).digest == first.digest
