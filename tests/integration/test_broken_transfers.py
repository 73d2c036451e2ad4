"""What happens to data when the connection or the process breaks in the middle: on a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.parts import PART, THREADS
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import commit_output, fetch, pin_external
from airflow_mlpipelines.storage.trees import digest_tree
from airflow_mlpipelines.storage.uploads import upload_files
from tests.integration.breaking_proxy import BreakingProxy
from tests.integration.versitygw_server import S3_KEYS, find_versitygw, run_versitygw
from tests.parts import missing

pytestmark = pytest.mark.s3

LARGE = 22 * PART + 12345
BREAK = 16 * PART
SLACK = 2 << 20  # what HTTP and the listings add
FILES = 400


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A real server, behind a proxy that can break: where its files are, and the proxy."""
    program = find_versitygw()
    if program is None:
        missing("no versitygw: .ci/versitygw.sh builds it")
    root = tmp_path_factory.mktemp("served")
    with run_versitygw(program, root) as url, BreakingProxy(int(url.rpartition(":")[2])) as proxy:
        yield root, proxy


@pytest.fixture
def bucket(served, request):
    """The directory that is a bucket of the test's own."""
    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    (served[0] / name).mkdir()
    return served[0] / name


@pytest.fixture
def proxy(served):
    yield served[1]
    served[1].heal()


@pytest.fixture
def place(bucket, proxy):
    """The datastore's address, and the arguments with which it is opened."""
    client = {"endpoint_url": f"http://127.0.0.1:{proxy.port}", "region_name": "us-east-1"}
    quick = {"retries": {"max_attempts": 0}, "connect_timeout": 5, "read_timeout": 10}
    options = {"key": S3_KEYS[0], "secret": S3_KEYS[1], "client_kwargs": client}
    return f"s3://{bucket.name}/team", {**options, "config_kwargs": quick}


@pytest.fixture
def store(place):
    return open_store("lake", place[0], credentials=place[1])


@pytest.fixture
def blobs(tmp_path):
    return BlobCache(tmp_path / "blobs", limit=1 << 40)


@pytest.fixture
def large(tmp_path):
    file = tmp_path / "model.bin"
    with file.open("wb") as opened:
        for _ in range(0, LARGE, PART):
            opened.write(os.urandom(min(PART, LARGE - opened.tell())))
    return file


@pytest.fixture
def many(tmp_path):
    root = tmp_path / "many"
    for number in range(FILES):
        file = root / f"{number % 7}" / f"{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(20_000))
    return root


def unfinished(store):
    listing = store.filesystem.call_s3(
        "list_multipart_uploads", Bucket=store.remote_path("").split("/")[0]
    )
    return listing.get("Uploads", [])


WORK = """
    import json, sys
    from pathlib import Path
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.stores import StoreSet, open_store
    from airflow_mlpipelines.storage.transfer import commit_output, fetch

    url, options, artifact, source, home = map(json.loads, sys.argv[1:])
    store = open_store("lake", url, credentials=options)
    if artifact is None:
        commit_output(store, "run/out", Path(source), step_run="r")
    else:
        blobs = BlobCache(Path(home, "blobs"), limit=1 << 40)
        stores = StoreSet([store], "lake")
        fetch(Artifact.from_dict(artifact), stores, blobs=blobs, target=Path(home, "target"))
"""


def kill_in_the_middle(proxy, place, tmp_path, *, way, after, artifact=None, source=None):
    """Send or fetch in a process of its own, which is killed once so many bytes have passed."""
    proxy.heal()
    proxy.limit(way, after, then="hold")
    data = (artifact.to_dict() if artifact else None, str(source) if source else None)
    words = [json.dumps(word) for word in (*place, *data, str(tmp_path))]
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORK), *words])
    try:
        assert proxy.reached.wait(120)
    finally:
        process.kill()
        assert process.wait() == -9
    passed = getattr(proxy, way)
    proxy.heal()
    return passed


# ---- down ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["connection", "process"])
def test_a_large_file_that_broke_off_is_fetched_from_there_on(
    store, place, proxy, blobs, large, tmp_path, how
):
    artifact = commit_output(store, "run/out", large, step_run="r")
    stores, target = StoreSet([store], "lake"), tmp_path / "target"
    if how == "process":
        passed = kill_in_the_middle(
            proxy, place, tmp_path, way="down", after=BREAK, artifact=artifact
        )
    else:
        proxy.heal()
        proxy.limit("down", BREAK, then="drop")
        with pytest.raises(DataError, match="datastore 'lake'"):
            fetch(artifact, stores, blobs=blobs, target=target)
        passed = proxy.down
        proxy.heal()
    assert passed > BREAK - PART
    assert not target.exists()
    assert not blobs.path_of(artifact.digest).exists()

    fetch(artifact, stores, blobs=blobs, target=target)

    in_flight = THREADS * PART
    assert proxy.down < LARGE - passed + in_flight + SLACK < LARGE
    assert digest_tree(target).digest == artifact.digest
    assert list((tmp_path / "blobs/incoming").iterdir()) == []


def test_a_tree_that_broke_off_is_fetched_but_for_what_has_come(
    store, place, proxy, blobs, many, tmp_path
):
    artifact = commit_output(store, "run/out", many, step_run="r")
    passed = kill_in_the_middle(
        proxy, place, tmp_path, way="down", after=4_000_000, artifact=artifact
    )

    fetch(artifact, StoreSet([store], "lake"), blobs=blobs, target=tmp_path / "target")

    assert passed > 3_900_000
    assert proxy.down < 8_000_000 - passed + 1_500_000  # listings are 300 KB each
    assert digest_tree(tmp_path / "target").digest == artifact.digest


def test_what_came_of_a_listing_that_is_no_more_is_not_among_what_is_published(
    store, place, proxy, blobs, many, tmp_path
):
    artifact = commit_output(store, "run/out", many, step_run="r")
    for name in ("0/00.bin", "0/not/here.bin"):  # somebody puts files there, and takes them away
        store.filesystem.pipe_file(store.remote_path(f"run/out/{name}"), b"theirs")
    kill_in_the_middle(proxy, place, tmp_path, way="down", after=4_000_000, artifact=artifact)
    (left,) = (tmp_path / "blobs/incoming").glob("part-*/blob")
    assert (left / "0/not/here.bin").exists()
    for name in ("0/00.bin", "0/not/here.bin"):
        store.filesystem.rm_file(store.remote_path(f"run/out/{name}"))

    fetch(artifact, StoreSet([store], "lake"), blobs=blobs, target=tmp_path / "target")

    assert digest_tree(tmp_path / "target").digest == artifact.digest


def test_what_was_damaged_after_it_came_is_noticed_and_fetched_anew(
    store, place, proxy, blobs, large, tmp_path
):
    artifact = commit_output(store, "run/out", large, step_run="r")
    kill_in_the_middle(proxy, place, tmp_path, way="down", after=BREAK, artifact=artifact)
    (left,) = (tmp_path / "blobs/incoming").glob("part-*/blob")
    with left.open("r+b") as file:
        file.write(b"somebody's own")

    fetch(artifact, StoreSet([store], "lake"), blobs=blobs, target=tmp_path / "target")

    assert digest_tree(tmp_path / "target").digest == artifact.digest


def test_parts_of_what_has_changed_meanwhile_are_not_put_together(
    store, place, proxy, blobs, bucket, large, tmp_path
):
    (bucket / "team").mkdir()
    store.filesystem.put_file(str(large), store.remote_path("raw"))
    pinned = pin_external(store, "raw", how="version")
    kill_in_the_middle(proxy, place, tmp_path, way="down", after=BREAK, artifact=pinned)
    other = bytes(reversed(large.read_bytes()))
    store.filesystem.pipe_file(store.remote_path("raw"), other)

    with pytest.raises(DataError, match="was changed after this run had looked it up"):
        fetch(pinned, StoreSet([store], "lake"), blobs=blobs, target=tmp_path / "target")
    assert not (tmp_path / "target").exists()

    now = pin_external(store, "raw", blobs=blobs)
    place = fetch(now, StoreSet([store], "lake"), blobs=blobs, target=tmp_path / "target")
    assert place.read_bytes() == other


# ---- up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["connection", "process"])
def test_a_large_file_that_broke_off_is_sent_from_there_on(
    store, place, proxy, bucket, blobs, large, tmp_path, how
):
    if how == "process":
        passed = kill_in_the_middle(proxy, place, tmp_path, way="up", after=BREAK, source=large)
    else:
        proxy.heal()
        proxy.limit("up", BREAK, then="drop")
        with pytest.raises(DataError, match="datastore 'lake'"):
            commit_output(store, "run/out", large, step_run="r")
        passed = proxy.up
        proxy.heal()
    assert passed > BREAK - PART
    assert not store.exists("run/out")
    assert len(unfinished(store)) == 1
    proxy.heal()

    artifact = commit_output(store, "run/out", large, step_run="r")

    in_flight = THREADS * PART
    assert proxy.up < LARGE - passed + in_flight + SLACK < LARGE
    assert artifact.digest == digest_tree(large).digest
    assert (bucket / "team/run/out").read_bytes() == large.read_bytes()
    assert unfinished(store) == []


def test_a_file_that_was_made_anew_is_not_put_together_with_what_was_sent_of_the_old_one(
    store, place, proxy, bucket, large, tmp_path
):
    kill_in_the_middle(proxy, place, tmp_path, way="up", after=BREAK, source=large)
    large.write_bytes(bytes(reversed(large.read_bytes())))

    commit_output(store, "run/out", large, step_run="r")

    assert (bucket / "team/run/out").read_bytes() == large.read_bytes()


def test_a_tree_that_broke_off_is_sent_but_for_what_is_there(
    store, place, proxy, bucket, many, tmp_path
):
    passed = kill_in_the_middle(proxy, place, tmp_path, way="up", after=4_000_000, source=many)
    there = {file for file in (bucket / "team/run/out").rglob("*.bin") if file.is_file()}
    gone = many / "3" / "3.bin"
    gone.unlink()  # the program has run again, and made other files
    (many / "3" / "new.bin").write_bytes(b"new")

    artifact = commit_output(store, "run/out", many, step_run="r")

    assert len(there) > 100
    assert proxy.up < 8_000_000 - passed + 1_500_000
    assert (
        digest_tree(bucket / "team/run/out").digest == artifact.digest == digest_tree(many).digest
    )


def test_what_was_sent_whole_is_not_sent_again(store, proxy, large, many):
    large.rename(many / "model.bin")
    first = commit_output(store, "run/out", many, step_run="r")
    proxy.heal()

    assert commit_output(store, "run/out", many, step_run="r") == first
    assert proxy.up < 1_000_000
    assert Path(many / "model.bin").exists()


# ---- to places of others -------------------------------------------------------------------------


def test_what_another_one_is_sending_to_a_place_of_others_is_left_to_him(
    store, proxy, bucket, tmp_path
):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/model.bin").write_bytes(os.urandom(PART + 1))
    place, key = {"Bucket": bucket.name}, {"Key": "team/place/model.bin"}
    theirs = store.filesystem.call_s3("create_multipart_upload", **place, **key)["UploadId"]

    upload_files(store, "place", tmp_path / "made", overwrite=False, step_run="r")

    assert digest_tree(bucket / "team/place").digest == digest_tree(tmp_path / "made").digest
    assert [upload["UploadId"] for upload in unfinished(store)] == [theirs]


def test_an_upload_to_a_place_of_others_that_fails_leaves_nothing_there(
    store, proxy, large, tmp_path
):
    (tmp_path / "made").mkdir()
    file = large.rename(tmp_path / "made/model.bin")
    proxy.heal()
    proxy.limit("up", BREAK, then="hold")

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(
            upload_files, store, "place", file.parent, overwrite=False, step_run="r"
        )
        assert proxy.reached.wait(120)
        os.truncate(file, PART)
        proxy.heal()
        with pytest.raises(DataError):
            sending.result(300)

    assert not store.exists("place/model.bin")
    assert unfinished(store) == []
