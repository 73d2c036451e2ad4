"""The storage on versitygw, an S3 server of its own process that knows keys and signatures."""

# ruff: noqa: F811 - fixtures are arguments of the names that they are imported under
from __future__ import annotations

import os
import traceback
import unicodedata
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from airflow_mlpipelines import CommandStep, DataReference, Pipeline, PipelineData, Workspace
from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.connections import open_datastore
from airflow_mlpipelines.storage.snapshots import (
    list_source_files,
    make_snapshot,
    unpack_snapshot,
)
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import (
    commit_output,
    fetch,
    missing_artifacts,
    pin_external,
)
from airflow_mlpipelines.storage.trees import digest_tree
from tests.dags.conftest import airflow_db  # noqa: F401 - a fixture
from tests.dags.project import run_dag
from tests.integration.s3_server import (  # noqa: F401 - fixtures
    REGION,
    blobs,
    bucket,
    make_connection,
    server,
    store,
)
from tests.parts import missing

pytestmark = pytest.mark.s3


@pytest.fixture
def stores(store):
    return StoreSet([store], "lake")


@pytest.fixture
def made(tmp_path):
    """A directory that a step made."""
    root = tmp_path / "made"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("hello")
    (root / "sub" / "b.txt").write_text("world")
    return root


NAMES = [
    "plain.txt",
    "deep/er/and/deeper.bin",
    "grüße/日本語 🛫.csv",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    " spaces at both ends ",
    "signs #?%20*[a]+&=;'\"{}$~.txt",
    "-",
    "empty",
]


# ---- outputs -------------------------------------------------------------------------------------


def test_a_tree_goes_to_the_bucket_and_comes_back_bit_by_bit(stores, bucket, blobs, tmp_path):
    source = tmp_path / "made"
    for name in NAMES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"" if name == "empty" else os.urandom(1000))
    (source / "large").write_bytes(os.urandom(9 << 20))

    artifact = commit_output(stores.default, "run/out", source, step_run="r1")
    place = fetch(artifact, stores, blobs=blobs, target=tmp_path / "target")

    assert artifact.uri == f"s3://{bucket.name}/team/run/out"
    assert (artifact.kind, artifact.files) == ("dir", len(NAMES) + 1)
    assert bucket.keys() == {f"team/run/out/{name}" for name in [*NAMES, "large"]}
    assert digest_tree(place).digest == artifact.digest == digest_tree(source).digest
    assert all((place / n).read_bytes() == (source / n).read_bytes() for n in [*NAMES, "large"])
    assert missing_artifacts([artifact], stores) == []


def test_a_file_that_is_sent_in_parts_comes_back_bit_by_bit(stores, blobs, tmp_path):
    source = tmp_path / "model.bin"
    with source.open("wb") as file:
        file.write(os.urandom(1000))
        file.truncate(101 << 20)  # from 100 MiB on

    artifact = commit_output(stores.default, "run/model", source, step_run="r1")
    place = fetch(artifact, stores, blobs=blobs, target=tmp_path / "target")

    assert (artifact.kind, artifact.files, artifact.size) == ("file", 1, 101 << 20)
    assert place.is_file()
    assert digest_tree(place).digest == artifact.digest
    assert missing_artifacts([artifact], stores) == []


def test_what_a_bucket_cannot_hold_is_refused_before_anything_is_sent(store, bucket, tmp_path):
    nested, empty, odd = tmp_path / "nested", tmp_path / "empty", tmp_path / "odd"
    (nested / "full" / "hollow").mkdir(parents=True)
    (nested / "a.txt").write_text("1")
    empty.mkdir()
    odd.mkdir()
    (odd / os.fsdecode(b"latin-\xfc")).write_text("1")

    with pytest.raises(DataError, match="empty directory 'full/hollow'"):
        commit_output(store, "nested", nested, step_run="r")
    with pytest.raises(DataError, match="is an empty directory"):
        commit_output(store, "empty", empty, step_run="r")
    with pytest.raises(DataError, match=r"named b'latin-\\xfc', which is no UTF-8"):
        commit_output(store, "odd", odd, step_run="r")
    assert bucket.keys() == set()


def test_a_name_that_means_something_else_to_the_driver_is_refused(store, made):
    (made / "query?versionId=3").write_text("s3fs takes this for a version of 'query'")

    with pytest.raises(DataError, match=r"'query\?versionId=3' is not there under its name"):
        commit_output(store, "run/out", made, step_run="r")


# ---- data that others changed --------------------------------------------------------------------


def test_what_others_change_or_delete_is_noticed_by_a_process_that_saw_it_before(
    stores, bucket, made, blobs, tmp_path
):
    artifact = commit_output(stores.default, "run/out", made, step_run="r")
    assert pin_external(stores.default, "run").files == 2  # and now the listing is known
    assert missing_artifacts([artifact], stores) == []

    bucket.put("team/run/out/sub/b.txt", b"longer than before")
    assert "has 23 bytes in 2 files, not 10 in 2" in missing_artifacts([artifact], stores)[0][1]

    bucket.delete("team/run/out/sub/b.txt")
    assert "has 5 bytes in 1 files" in missing_artifacts([artifact], stores)[0][1]

    bucket.delete("team/run/out/a.txt")
    assert missing_artifacts([artifact], stores) == [(artifact, f"{artifact.uri} is gone")]
    assert not stores.default.exists("run/out")
    with pytest.raises(DataError, match="is gone"):
        fetch(artifact, stores, blobs=blobs, target=tmp_path / "t")


def test_other_bytes_of_the_same_size_are_never_handed_on(stores, bucket, made, blobs, tmp_path):
    artifact = commit_output(stores.default, "run/out", made, step_run="r")
    bucket.put("team/run/out/a.txt", b"hellO")

    with pytest.raises(DataError, match="they were changed or cut short"):
        fetch(artifact, stores, blobs=blobs, target=tmp_path / "t")
    assert not (tmp_path / "t").exists()
    assert not blobs.path_of(artifact.digest).exists()


def test_inputs_at_hand_are_left_to_the_program_of_an_earlier_try(stores, made, blobs, tmp_path):
    artifact = commit_output(stores.default, "run/out", made, step_run="r")
    fetch(artifact, stores, blobs=blobs, target=tmp_path / "t")
    (tmp_path / "t" / "notes.txt").write_text("the program's own")

    place = fetch(artifact, stores, blobs=blobs, target=tmp_path / "t")

    assert (place / "notes.txt").exists()


# ---- fetched once on a machine -------------------------------------------------------------------


def test_the_second_step_on_a_machine_fetches_nothing_and_can_damage_nothing(
    stores, bucket, made, blobs, server, tmp_path
):
    artifact = commit_output(stores.default, "run/out", made, step_run="r")
    first = fetch(artifact, stores, blobs=blobs, target=tmp_path / "t1")
    assert bucket.reads() == {"team/run/out/a.txt": 1, "team/run/out/sub/b.txt": 1}
    before = server.requests.copy()

    (first / "a.txt").chmod(0o644)
    (first / "a.txt").write_text("damaged")
    second = fetch(artifact, stores, blobs=blobs, target=tmp_path / "t2")

    assert server.requests == before
    assert digest_tree(second).digest == artifact.digest


def test_what_a_step_has_sent_is_not_fetched_on_its_machine(stores, bucket, made, blobs, tmp_path):
    artifact = commit_output(stores.default, "run/out", made, step_run="r", blobs=blobs)

    place = fetch(artifact, stores, blobs=blobs, target=tmp_path / "t")

    assert digest_tree(place).digest == artifact.digest
    assert bucket.reads() == {}


def test_data_that_a_plan_has_read_are_not_read_again_until_they_change(
    store, stores, bucket, blobs, tmp_path
):
    bucket.put("team/raw/a.csv", b"1")
    pinned = pin_external(store, "raw", blobs=blobs)
    fetch(pinned, stores, blobs=blobs, target=tmp_path / "t")
    assert pin_external(store, "raw", blobs=blobs) == pinned
    assert bucket.reads() == {"team/raw/a.csv": 1}

    bucket.put("team/raw/a.csv", b"2")
    assert pin_external(store, "raw", blobs=blobs).digest != pinned.digest
    assert bucket.reads() == {"team/raw/a.csv": 2}


# ---- external data -------------------------------------------------------------------------------


def test_content_counts_and_place_does_not(store, bucket, made, blobs, tmp_path):
    for key, body in {"raw/a.txt": b"hello", "raw/sub/b.txt": b"world"}.items():
        bucket.put(f"team/{key}", body)
        bucket.put(f"team/moved/to/{key}", body)

    pinned = pin_external(store, "raw", blobs=blobs)

    assert pinned.digest == digest_tree(made).digest  # as if it were on this machine's disk
    assert pin_external(store, "moved/to/raw").digest == pinned.digest
    assert (pinned.size, pinned.files, pinned.kind) == (10, 2, "dir")
    bucket.delete("team/raw/a.txt")  # read once, for the digest
    bucket.put("team/raw/a.txt", b"hello")
    place = fetch(pinned, StoreSet([store], "lake"), blobs=blobs, target=tmp_path / "t")
    assert (place / "sub/b.txt").read_text() == "world"

    bucket.put("team/raw/a.txt", b"hellO")
    assert pin_external(store, "raw").digest != pinned.digest


def test_nothing_there_is_no_error_and_is_found_once_somebody_puts_it_there(store, bucket):
    bucket.put("team/raw/a.csv", b"1")
    assert pin_external(store, "raw").files == 1
    assert pin_external(store, "raw/b.csv") is None

    bucket.put("team/raw/b.csv", b"22")

    assert store.exists("raw/b.csv")
    assert pin_external(store, "raw/b.csv").size == 2
    assert pin_external(store, "raw").files == 2


def test_the_empty_objects_that_consoles_make_for_folders_do_not_count(store, bucket):
    bucket.put("team/raw/a.csv", b"1")
    before = pin_external(store, "raw")
    bucket.put("team/raw/")
    bucket.put("team/raw/new folder/")
    bucket.put("team/hollow/")

    assert pin_external(store, "raw") == before
    assert pin_external(store, "hollow").files == 0


def test_a_whole_datastore_is_external_data_as_well(server, store, bucket):
    bucket.put("team/a.csv", b"1")
    whole = open_store("whole", f"s3://{bucket.name}", credentials=server.credentials())

    assert pin_external(store, "").files == 1
    assert pin_external(whole, "").size == 1


def test_the_version_that_the_bucket_tells_may_stand_for_the_content(
    stores, store, bucket, blobs, tmp_path
):
    bucket.put("team/raw/a.csv", b"1")
    file, folder = (pin_external(store, path, how="version") for path in ("raw/a.csv", "raw"))
    assert file.digest.startswith("version:")
    assert pin_external(store, "raw/a.csv", how="version") == file
    place = fetch(file, stores, blobs=blobs, target=tmp_path / "t1")
    assert place.read_bytes() == b"1"

    bucket.put("team/raw/a.csv", b"2")

    assert pin_external(store, "raw/a.csv", how="version").digest != file.digest
    assert pin_external(store, "raw", how="version").digest != folder.digest
    for artifact in (file, folder):
        with pytest.raises(DataError, match="was changed after this run had looked it up"):
            fetch(artifact, stores, blobs=blobs, target=tmp_path / "t2")


# ---- snapshots -----------------------------------------------------------------------------------


def test_a_snapshot_is_stored_once_and_unpacked(store, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "home"))
    bucket.keep_versions()
    source = tmp_path / "source"
    (source / "lib").mkdir(parents=True)
    (source / "train.py").write_text("import lib.grüße\n")
    (source / "lib" / "grüße.py").write_text("WORD = 'hallo'\n")

    snapshot = make_snapshot(source, store)
    again = make_snapshot(source, store)
    unpack_snapshot(snapshot.digest, store, tmp_path / "unpacked")

    assert snapshot == again
    assert bucket.count_versions() == 1
    assert list_source_files(tmp_path / "unpacked") == ["lib/grüße.py", "train.py"]
    assert (tmp_path / "unpacked/lib/grüße.py").read_text() == "WORD = 'hallo'\n"

    (key,) = bucket.keys()
    bucket.delete(key)
    make_snapshot(source, store)
    assert bucket.keys() == {key}


# ---- credentials ---------------------------------------------------------------------------------

USES = {
    "exists": lambda store, _: store.exists("raw"),
    "read": lambda store, _: store.read_bytes("raw/a.csv"),
    "write": lambda store, _: store.write_bytes("raw/a.csv", b"1"),
    "delete": lambda store, _: store.delete("raw"),
    "pin": lambda store, _: pin_external(store, "raw"),
    "commit": lambda store, made: commit_output(store, "run/out", made, step_run="r"),
    "snapshot": lambda store, made: make_snapshot(made, store),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrong", ["bucket", "key", "secret"])
def test_a_wrong_setting_is_an_error_that_names_the_datastore_and_no_secret(
    server, bucket, made, wrong, use
):
    bucket.put("team/raw/a.csv", b"1")
    changes = {"key": "AKIANOBODYNOBODYNO12", "secret": "not-the-secret-at-all"}
    store = open_store(
        "lake",
        "s3://no-such-bucket/team" if wrong == "bucket" else f"s3://{bucket.name}/team",
        credentials=server.credentials(**{k: v for k, v in changes.items() if k == wrong}),
    )

    with pytest.raises(DataError, match="datastore 'lake'") as caught:
        USES[use](store, made)

    if wrong == "secret":  # of an unknown key versitygw says what no other server does: see below
        assert "Check the credentials in its Airflow connection" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert server.secret not in shown
    assert changes["secret"] not in shown


@pytest.fixture
def moto():
    """The address of moto, which answers to an unknown key as S3 does, and as versitygw does not."""
    if find_spec("moto") is None or find_spec("flask") is None:
        missing("no moto: pip install 'moto[server]'")
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        url = f"http://{host}:{port}"
        check_signatures(url, after="0")
        yield url
        check_signatures(url, after="inf")
    finally:
        running.stop()


def check_signatures(url, after):
    """Have moto check who asks, after this many more requests."""
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(
        f"{url}/moto-api/reset-auth", data=after.encode(), headers=headers
    )
    urllib.request.urlopen(request).close()


@pytest.mark.parametrize("use", USES)
def test_a_key_that_nobody_has_is_an_error_that_says_where_to_look(moto, made, use):
    client = {"endpoint_url": moto, "region_name": REGION}
    options = {"key": "AKIANOBODYNOBODYNO12", "secret": "not-the-secret-at-all"}
    store = open_store("lake", "s3://lake/team", credentials={**options, "client_kwargs": client})

    with pytest.raises(DataError, match=r"datastore 'lake'.*Check the credentials") as caught:
        USES[use](store, made)

    assert options["secret"] not in "".join(traceback.format_exception(caught.value))


def test_an_airflow_connection_gives_key_endpoint_and_region(server, bucket, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", make_connection(server))
    spec = DatastoreSpec(name="lake", url=f"s3://{bucket.name}/team", conn_id="lake")

    open_datastore(spec).write_bytes("a.txt", b"hello")

    assert bucket.get("team/a.txt") == b"hello"


# ---- a pipeline ----------------------------------------------------------------------------------


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_a_pipeline_whose_datastore_is_a_bucket_runs_and_then_reuses(
    server, bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", make_connection(server))
    (tmp_path / "mlpipelines.yaml").write_text(
        "name: clouds\ndefault_datastore: lake\n"
        f"datastores:\n  lake: {{url: 's3://{bucket.name}/team', conn_id: lake}}\n"
        "computes:\n  local: {type: local}\n"
    )
    workspace = Workspace.from_config(tmp_path)
    bucket.put("team/raw/words.txt", "Grüße aus dem Eimer\n".encode())
    raw = workspace.default_datastore.path("raw")

    def run():
        words, table = PipelineData("words"), PipelineData("table", is_directory=True)
        upper = CommandStep(
            ["sh", "-c", f"tr a-z A-Z < {raw}/words.txt > {words}"],
            name="upper",
            inputs=[raw],
            outputs=[words],
        )
        sort = CommandStep(
            ["sh", "-c", f"mkdir {table} && tr ' ' '\\n' < {words} | sort > {table}/sorted.txt"],
            name="sort",
            inputs=[words],
            outputs=[table],
        )
        return run_dag(Pipeline(workspace, [upper, sort], name="bucket_pipeline").to_dag())

    first = run()
    assert first.state == "success"
    assert first.ran == {"upper", "sort"}
    read = {key: number for key, number in bucket.reads().items() if "snapshots" not in key}
    assert read == {"team/raw/words.txt": 1}  # to plan; the steps' data never leave this machine
    table = first.outputs["sort"]["table"]
    key = table["uri"].removeprefix(f"s3://{bucket.name}/") + "/sorted.txt"
    assert bucket.get(key).decode().split() == ["AUS", "DEM", "EIMER", "GRüßE"]

    second = run()
    assert second.state == "success"
    assert second.steps == {"upper": "reused", "sort": "reused"}
    assert second.outputs["sort"]["table"] == table

    bucket.delete(key)
    third = run()
    assert third.steps == {"upper": "reused", "sort": "ran"}
    assert "is gone" in third.reasons["sort"]

    bucket.put("team/raw/words.txt", "Grüße aus dem Meer.\n".encode())
    assert run().ran == {"upper", "sort"}


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_a_step_that_writes_to_its_download_changes_it_for_nobody_else(
    server, bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", make_connection(server))
    (tmp_path / "mlpipelines.yaml").write_text(
        f"name: clouds\ndatastores:\n  lake: {{url: 's3://{bucket.name}/team', conn_id: lake}}\n"
    )
    workspace = Workspace.from_config(tmp_path)
    bucket.put("team/raw/words.txt", b"one\n")
    raw = workspace.default_datastore.path("raw")
    mine, seen = PipelineData("mine"), PipelineData("seen")
    append = CommandStep(
        [
            "sh",
            "-c",
            f"(stat -c %a {raw}/words.txt; echo two >> {raw}/words.txt; cat {raw}/words.txt) > {mine}",
        ],
        name="append",
        inputs=[raw.as_download()],
        outputs=[mine],
    )
    look = CommandStep(
        ["sh", "-c", f"(stat -c %a {raw}/words.txt; cat {raw}/words.txt {mine}) > {seen}"],
        name="look",
        inputs=[raw, mine],
        outputs=[seen],
    )

    done = run_dag(Pipeline(workspace, [append, look], name="download_pipeline").to_dag())

    assert done.state == "success"
    key = done.outputs["look"]["seen"]["uri"].removeprefix(f"s3://{bucket.name}/")
    assert bucket.get(key) == b"444\none\n644\none\ntwo\n"


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_a_program_that_asks_for_addresses_gets_them_and_nothing_is_fetched(
    server, bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", make_connection(server))
    (tmp_path / "mlpipelines.yaml").write_text(
        "name: clouds\ndefault_datastore: here\ndatastores:\n  here: {url: data}\n"
        f"  lake: {{url: 's3://{bucket.name}/team', conn_id: lake}}\n"
    )
    workspace = Workspace.from_config(tmp_path)
    bucket.put("team/raw/words.txt", b"one")
    lake = workspace.datastores["lake"]
    raw = DataReference(lake, "raw", "raw", mode="direct", pin="version")
    said = PipelineData("said")
    words = ["sh", "-c", f"echo {raw} $AZUREML_DATAREFERENCE_raw > {said}"]
    say = CommandStep(words, name="say", inputs=[raw], outputs=[said])

    done = run_dag(Pipeline(workspace, [say], name="direct_pipeline").to_dag())

    place = urllib.request.url2pathname(done.outputs["say"]["said"]["uri"].removeprefix("file://"))
    assert Path(place).read_text().split() == [f"s3://{bucket.name}/team/raw"] * 2
    assert bucket.reads() == {}
