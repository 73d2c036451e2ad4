"""The worker's blob cache: its limit, who may use it at once, and that nobody can damage it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.placing import make_writable, place
from airflow_mlpipelines.storage.trees import digest_tree

KB = 1000


@pytest.fixture
def source(tmp_path):
    """Makes files to fetch: returns digest, size and what fetches it, which counts."""

    class Source:
        def __init__(self):
            self.fetched = []

        def make(self, name, size=KB):
            file = tmp_path / f"source-{name}"
            file.write_bytes(name.encode() * (size // len(name)))

            def fetch(made):
                self.fetched.append(name)
                made.write_bytes(file.read_bytes())

            return digest_tree(file).digest, size, fetch

    return Source()


@pytest.fixture
def blobs(tmp_path):
    return BlobCache(tmp_path / "blobs", limit=3 * KB)


def use(blobs, blob):
    with blobs.use(*blob) as path:
        content = path.read_bytes()
    age(blobs)
    return content


def age(blobs):
    """Let everything have been used a second longer ago."""
    for lock in blobs._directory.glob("??/*.lock"):
        then = lock.stat().st_mtime_ns - 10**9
        os.utime(lock, ns=(then, then))


def kept(blobs, **made):
    return {name for name, (digest, _, _) in made.items() if blobs.path_of(digest).exists()}


def test_what_is_here_is_not_fetched_again(blobs, source):
    blob = source.make("a")

    assert use(blobs, blob) == use(blobs, blob) == b"a" * KB
    assert source.fetched == ["a"]


def test_what_was_used_longest_ago_goes_first(blobs, source):
    a, b, c, d = (source.make(name) for name in "abcd")
    for blob in (a, b, c, a, d):
        use(blobs, blob)

    assert kept(blobs, a=a, b=b, c=c, d=d) == {"a", "c", "d"}
    assert not blobs._lock_of(blobs.path_of(b[0])).exists()


def test_what_is_in_use_stays_whatever_the_limit(blobs, source):
    a, b, c = source.make("a"), source.make("b", 3 * KB), source.make("c", 2 * KB)

    with blobs.use(*a) as path:
        age(blobs)
        use(blobs, b)
        use(blobs, c)
        assert path.read_bytes() == b"a" * KB
        assert kept(blobs, a=a, b=b, c=c) == {"a", "c"}

    use(blobs, b)
    assert kept(blobs, a=a, b=b, c=c) == {"b"}


def test_what_is_larger_than_the_limit_is_used_and_not_kept_and_pushes_nothing_out(blobs, source):
    small, large = source.make("a"), source.make("b", 4 * KB)
    use(blobs, small)

    assert use(blobs, large) == b"b" * 4 * KB
    assert kept(blobs, small=small, large=large) == {"small"}


def test_a_failed_fetch_leaves_nothing(blobs, source, tmp_path):
    digest, size, _ = source.make("a")

    with (
        pytest.raises(DataError, match="changed or cut short"),
        blobs.use(digest, size, lambda made: made.write_text("other")),
    ):
        pass
    with pytest.raises(OSError, match="unplugged"), blobs.use(digest, size, unplug):
        pass

    assert not blobs.path_of(digest).exists()
    assert list((tmp_path / "blobs" / "incoming").iterdir()) == []


def unplug(made):
    made.write_text("a")
    raise OSError("unplugged")


def break_off(made):
    made.write_bytes(b"x" * 30 * KB)
    (made.parent / "parts").write_text("what has come")
    raise OSError("unplugged")


def fetch_on(seen):
    """Return what goes on with a fetch that broke off, and tells what it finds of it."""

    def fetch(made):
        seen.extend((member.name, member.stat().st_size) for member in made.parent.iterdir())
        made.write_bytes(b"x" * 40 * KB)

    return fetch


@pytest.mark.parametrize("how", ["use", "add"])
def test_a_fetch_that_broke_off_goes_on_though_it_and_the_whole_do_not_fit_in_together(
    source, tmp_path, how
):
    digest, size, _ = source.make("x", 40 * KB)
    other = source.make("o", 20 * KB)
    seen = []

    def bring(fetch):
        blobs = BlobCache(tmp_path / "blobs", limit=64 * KB)
        if how == "add":
            blobs.add(size, fetch, name="s3://lake/model etag=1")
        else:
            use(blobs, (digest, size, fetch))
        return blobs

    use(BlobCache(tmp_path / "blobs", limit=64 * KB), other)
    with pytest.raises(OSError, match="unplugged"):
        bring(break_off)
    blobs = bring(fetch_on(seen))

    assert sorted(seen) == [("blob", 30 * KB), ("parts", len("what has come"))]
    assert blobs.path_of(digest).stat().st_size == size
    assert kept(blobs, other=other) == {"other"}, "what fits in beside it has gone for it"


FETCH = """
    import sys, time
    from pathlib import Path
    from airflow_mlpipelines.storage.blobs import BlobCache

    directory, digest, log = sys.argv[1:]

    def fetch(made):
        with open(log, "a") as file:
            file.write("fetched\\n")
        time.sleep(0.5)
        made.write_bytes(b"x" * 1000)

    with BlobCache(Path(directory), limit=10_000).use(digest, 1000, fetch) as path:
        print(path.stat().st_size, flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes that fetch the same blob and keep using it until their input ends."""
    (tmp_path / "x").write_bytes(b"x" * 1000)
    digest = digest_tree(tmp_path / "x").digest
    script = tmp_path / "fetch.py"
    script.write_text(textwrap.dedent(FETCH))
    with ExitStack() as processes:

        def start():
            words = [sys.executable, script, tmp_path / "blobs", digest, tmp_path / "log"]
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ, text=True
            )
            processes.callback(process.__exit__, None, None, None)
            processes.callback(process.kill)
            return process

        start.digest = digest
        yield start


def test_processes_that_want_the_same_fetch_it_once(start, tmp_path):
    processes = [start() for _ in range(4)]

    assert [process.communicate("")[0].strip() for process in processes] == ["1000"] * 4
    assert (tmp_path / "log").read_text() == "fetched\n"


def test_what_another_process_uses_stays_until_that_process_is_lost(start, source, tmp_path):
    blobs = BlobCache(tmp_path / "blobs", limit=KB)
    process = start()
    assert process.stdout.readline() == "1000\n"
    age(blobs)

    use(blobs, source.make("a"))
    assert blobs.path_of(start.digest).exists()

    process.kill()
    process.wait()
    use(blobs, source.make("b"))
    assert not blobs.path_of(start.digest).exists()


def test_what_a_lost_process_left_is_deleted_and_work_going_on_is_not(blobs, source, tmp_path):
    left = tmp_path / "blobs" / "incoming" / "1-left"
    left.mkdir(parents=True)
    (left / "blob").write_text("half")
    os.utime(left, (0, 0))
    digest, size, fetch = source.make("a")

    def slow_fetch(made):
        os.utime(made.parent, (0, 0))
        use(blobs, source.make("b"))
        fetch(made)

    assert use(blobs, (digest, size, slow_fetch)) == b"a" * KB
    assert not left.exists()


@pytest.mark.parametrize("link", [True, False])
def test_a_tree_is_placed_read_only_and_a_copy_of_ones_own_is_writable(blobs, tmp_path, link):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "a.txt").write_text("hello")
    found = digest_tree(tree).digest

    blobs.adopt(found, 5, tree)
    place(blobs.path_of(found), tmp_path / "there", link=link)

    file, original = tmp_path / "there/sub/a.txt", blobs.path_of(found) / "sub/a.txt"
    assert not tree.exists()
    assert file.stat().st_mode & 0o222 == 0
    assert file.samefile(original) is link
    if not link:
        make_writable(tmp_path / "there")
        file.write_text("changed")
        assert original.read_text() == "hello"


def test_an_owner_who_writes_against_the_rights_does_not_damage_the_cache(blobs, source, tmp_path):
    blob = source.make("a")
    with blobs.use(*blob) as path:
        place(path, tmp_path / "input", link=False)

    (tmp_path / "input").chmod(0o666)
    (tmp_path / "input").write_text("damaged")

    assert use(blobs, blob) == b"a" * KB


def test_the_limit_is_a_tenth_of_the_disk_and_at_most_50_gib(tmp_path):
    disk = os.statvfs(tmp_path)

    limit = BlobCache(tmp_path / "blobs").limit

    assert limit == min(50 << 30, disk.f_frsize * disk.f_blocks // 10)


@pytest.mark.parametrize("when", ["open", "flock"])
def test_a_room_may_be_thrown_away_while_another_process_comes_for_it(blobs, monkeypatch, when):
    module = {"open": os, "flock": fcntl}[when]
    real, thrown_away = getattr(module, when), []

    def call(*args):
        rooms = list(blobs._directory.glob("incoming/part-*"))
        if rooms and not thrown_away:  # as a process that needs the space does at that very moment
            thrown_away.append(rooms[0])
            rooms[0].rmdir()
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(module, when, call)
        with blobs._room("the same") as room:
            (room / "blob").write_text("1")

    assert thrown_away == [room]
