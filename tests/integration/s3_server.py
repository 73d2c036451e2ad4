"""versitygw with one user, for the tests of a module: fixtures, and its buckets as others than our storage see them."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from importlib.util import find_spec
from urllib.parse import unquote

import pytest

from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import open_store
from tests.integration.versitygw_server import S3_KEYS, find_versitygw, run_versitygw
from tests.parts import missing

REGION = "eu-central-1"
_REQUEST = re.compile(r" s3_(\w+) .*? (/\S*) \d{3} - ")
_numbers = itertools.count()


class Server:
    """An S3 server with one user, whose key alone may read and write; it checks signatures."""

    def __init__(self, url, log):
        import boto3

        self.url = url
        self._log = log
        self.key, self.secret = S3_KEYS
        self.client = boto3.client(
            "s3",
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            endpoint_url=url,
            region_name=REGION,
        )

    @property
    def requests(self):
        """What it was asked, by operation and path, as its access log has it."""
        found = _REQUEST.findall(self._log.read_text())
        return Counter((operation, unquote(path)) for operation, path in found)

    def credentials(self, **changes):
        """Return the arguments for the filesystem, as an Airflow connection becomes them."""
        client = {"endpoint_url": self.url, "region_name": REGION}
        return {"key": self.key, "secret": self.secret, "client_kwargs": client, **changes}


class Bucket:
    """A bucket, seen by somebody else than our storage: what is there, and what others do there."""

    def __init__(self, server):
        self.name = f"bucket-{next(_numbers)}"
        self._server = server
        self._client = server.client
        self._client.create_bucket(
            Bucket=self.name, CreateBucketConfiguration={"LocationConstraint": REGION}
        )

    def keys(self):
        listing = self._client.list_objects_v2(Bucket=self.name)
        return {item["Key"] for item in listing.get("Contents", [])}

    def put(self, key, body=b""):
        self._client.put_object(Bucket=self.name, Key=key, Body=body)

    def get(self, key):
        return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def delete(self, key):
        self._client.delete_object(Bucket=self.name, Key=key)

    def reads(self):
        """Return how often each object was read."""
        start = f"/{self.name}/"
        return {
            path.removeprefix(start): number
            for (operation, path), number in self._server.requests.items()
            if operation == "GetObject" and path.startswith(start)
        }

    def keep_versions(self):
        self._client.put_bucket_versioning(
            Bucket=self.name, VersioningConfiguration={"Status": "Enabled"}
        )

    def count_versions(self):
        return len(self._client.list_object_versions(Bucket=self.name).get("Versions", []))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that checks signatures, keeps versions, and logs what it is asked."""
    for module in ("s3fs", "boto3"):
        if find_spec(module) is None:
            missing(f"no {module}: pip install 'airflow-mlpipelines[s3]' boto3")
    program = find_versitygw()
    if program is None:
        missing("no versitygw: .ci/versitygw.sh builds it")
    home = tmp_path_factory.mktemp("s3")
    for name in ("served", "versions"):
        (home / name).mkdir()
    log = home / "access.log"
    options = {"region": REGION, "access_log": log, "versions": home / "versions"}
    with run_versitygw(program, home / "served", **options) as url:
        yield Server(url, log)


@pytest.fixture
def bucket(server):
    return Bucket(server)


@pytest.fixture
def store(server, bucket):
    return open_store("lake", f"s3://{bucket.name}/team", credentials=server.credentials())


@pytest.fixture
def blobs(tmp_path):
    return BlobCache(tmp_path / "blobs")


def make_connection(server):
    """Return an Airflow connection as an environment variable has it."""
    return json.dumps(
        {
            "conn_type": "aws",
            "login": server.key,
            "password": server.secret,
            "extra": {"endpoint_url": server.url, "region_name": REGION},
        }
    )
