"""S3 by the ways that the quick client does not go: a private CA, a proxy, encryption, somebody else who pays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.parts import PART, THREADS
from airflow_mlpipelines.storage.s3_objects import find_objects
from airflow_mlpipelines.storage.stores import StoreSet, open_store
from airflow_mlpipelines.storage.transfer import commit_output, fetch
from airflow_mlpipelines.storage.trees import digest_tree
from tests.integration.breaking_proxy import BreakingProxy
from tests.integration.versitygw_server import S3_KEYS, find_versitygw, run_versitygw
from tests.parts import missing

pytestmark = pytest.mark.s3

LARGE = 3 * PART + 12345
HUGE = 22 * PART
BREAK = 16 * PART
MB = 1_000_000


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that no one has signed but itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    root = tmp_path_factory.mktemp("certificate")
    files = root / "cert.pem", root / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(kind, form, serialization.NoEncryption()))
    return files


@pytest.fixture(scope="module")
def served(tmp_path_factory, certificate):
    """By ``https`` and by ``http``, the directory that is served, its address, and a proxy that can break before it."""
    program = find_versitygw()
    if program is None:
        missing("no versitygw: .ci/versitygw.sh builds it")
    roots = {name: tmp_path_factory.mktemp(name) for name in ("https", "http")}
    with (
        run_versitygw(program, roots["https"], certificate=certificate) as secure,
        run_versitygw(program, roots["http"]) as plain,
        BreakingProxy(int(secure.rpartition(":")[2])) as secure_proxy,
        BreakingProxy(int(plain.rpartition(":")[2])) as plain_proxy,
    ):
        yield {
            "https": (roots["https"], secure, secure_proxy),
            "http": (roots["http"], plain, plain_proxy),
        }


class Way:
    """A datastore and what stands between it and us.

    Attributes:
        bucket: The directory that is its bucket.
        proxy: Counts what passes, and can break.
        arguments: What the datastore is opened with.
        environment: Variables of the processes that use it.
    """

    def __init__(self, root, proxy, arguments, environment=None):
        self.bucket = root / f"bucket-{os.urandom(4).hex()}"
        self.bucket.mkdir()
        self.proxy, self.arguments, self.environment = proxy, arguments, environment or {}
        self.url = f"s3://{self.bucket.name}/team"

    def open(self):
        return open_store("lake", self.url, credentials=self.arguments)


@pytest.fixture(params=["private CA", "proxy", "encrypted", "requester pays"])
def way(request, served, certificate, monkeypatch):
    """A way on which :func:`find_objects` finds nothing."""
    kind = request.param
    root, url, proxy = served["https" if kind == "private CA" else "http"]
    through = f"{url.partition(':')[0]}://127.0.0.1:{proxy.port}"
    client = {"endpoint_url": through, "region_name": "us-east-1"}
    arguments = {
        "key": S3_KEYS[0],
        "secret": S3_KEYS[1],
        "client_kwargs": client,
        "config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": 60},
    }
    environment = {}
    if kind == "private CA":
        client["verify"] = str(certificate[0])
    elif kind == "proxy":
        client["endpoint_url"] = url
        environment = {"HTTP_PROXY": through, "http_proxy": through, "no_proxy": "", "NO_PROXY": ""}
    elif kind == "encrypted":
        arguments["s3_additional_kwargs"] = {"ServerSideEncryption": "AES256"}
    else:
        arguments["requester_pays"] = True
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proxy.heal()
    yield Way(root, proxy, arguments, environment)
    proxy.heal()


@pytest.fixture
def made(tmp_path):
    """Small files and a large one, as a step makes them."""
    root = tmp_path / "made"
    (root / "sub").mkdir(parents=True)
    for number in range(20):
        (root / "sub" / f"{number}.txt").write_text(f"hello {number}")
    (root / "model.bin").write_bytes(os.urandom(LARGE))
    return root


def test_a_tree_goes_there_and_back_and_what_is_there_is_not_sent_again(way, made, tmp_path):
    store = way.open()
    artifact = commit_output(store, "out", made, step_run="r")
    place = fetch(
        artifact,
        StoreSet([store], "lake"),
        blobs=BlobCache(tmp_path / "blobs", limit=1 << 40),
        target=tmp_path / "t",
    )
    assert find_objects(store) is None
    assert way.proxy.up > LARGE
    assert digest_tree(place).digest == artifact.digest == digest_tree(made).digest
    assert digest_tree(way.bucket / "team/out").digest == artifact.digest

    way.proxy.heal()
    assert commit_output(store, "out", made, step_run="r") == artifact
    assert way.proxy.up < MB


@pytest.mark.parametrize("way", ["proxy"], indirect=True)
def test_a_large_file_that_broke_off_is_sent_from_there_on(way, tmp_path):
    store, huge = way.open(), tmp_path / "model.bin"
    with huge.open("wb") as file:
        for _ in range(0, HUGE, PART):
            file.write(os.urandom(PART))
    way.proxy.limit("up", BREAK, then="drop")
    with pytest.raises(DataError, match="datastore 'lake'"):
        commit_output(store, "out", huge, step_run="r")
    passed = way.proxy.up
    way.proxy.heal()

    artifact = commit_output(store, "out", huge, step_run="r")

    assert passed > BREAK - PART
    assert way.proxy.up < HUGE - passed + THREADS * PART + 2 * MB < HUGE
    assert digest_tree(way.bucket / "team/out").digest == artifact.digest


SEND = """
    import json, re, sys
    from pathlib import Path
    from airflow_mlpipelines.storage.stores import open_store
    from airflow_mlpipelines.storage.transfer import commit_output

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

    url, arguments, small, large = json.loads(sys.argv[1])
    store = open_store("lake", url, credentials=arguments)
    commit_output(store, "small", Path(small), step_run="r")
    before = peak()
    commit_output(store, "large", Path(large), step_run="r")
    print(json.dumps([before, peak()]))
"""


@pytest.mark.parametrize("way", ["private CA"], indirect=True)
def test_large_files_take_no_more_memory_than_their_parts(way, made, tmp_path):
    (tmp_path / "large").mkdir()
    for number in range(2):
        with (tmp_path / "large" / f"{number}.bin").open("wb") as file:
            file.truncate(250 * MB)
    words = [way.url, way.arguments, str(made / "sub"), str(tmp_path / "large")]

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SEND), json.dumps(words)],
        check=True,
        capture_output=True,
        timeout=250,
        env={**os.environ, **way.environment},
    )

    before, after = json.loads(done.stdout)  # KiB
    assert after - before < 2 * THREADS * PART >> 10
