"""Datastores whose Airflow connection names a role: a server that knows users, roles, policies and signatures."""

from __future__ import annotations

import json
import os
import urllib.parse
import urllib.request
from collections import Counter

import pytest

from airflow_mlpipelines.definition.graph import DatastoreSpec
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.connections import open_datastore
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.portable import describe_store, open_described
from airflow_mlpipelines.storage.s3_objects import find_objects
from airflow_mlpipelines.storage.stores import StoreSet
from airflow_mlpipelines.storage.transfer import commit_output, fetch
from airflow_mlpipelines.storage.trees import digest_tree
from tests.parts import missing

pytestmark = pytest.mark.s3

REGION = "eu-central-1"
ACCOUNT = "123456789012"


class Cloud:
    """A server with the bucket ``lake``, which the role ``ml`` alone may use, and a user who may take on that role."""

    role = f"arn:aws:iam::{ACCOUNT}:role/ml"

    def __init__(self, url, asked):
        import boto3

        self.url = url
        self._asked = asked
        common = {"endpoint_url": url, "region_name": REGION}
        root = {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
        iam = boto3.client("iam", **root, **common)
        iam.create_user(UserName="worker")
        document = self._allow("sts:AssumeRole")
        iam.put_user_policy(UserName="worker", PolicyName="p", PolicyDocument=document)
        trust = self._allow("sts:AssumeRole", Principal={"AWS": "*"})
        iam.create_role(RoleName="ml", AssumeRolePolicyDocument=trust)
        iam.put_role_policy(RoleName="ml", PolicyName="p", PolicyDocument=self._allow("s3:*"))
        iam.create_user(UserName="stranger")
        self.worker, self.stranger = (
            iam.create_access_key(UserName=name)["AccessKey"] for name in ("worker", "stranger")
        )
        place = {"LocationConstraint": REGION}
        boto3.client("s3", **root, **common).create_bucket(
            Bucket="lake", CreateBucketConfiguration=place
        )

    def _allow(self, action, **more):
        statement = {"Effect": "Allow", "Action": action, **more}
        if "Principal" not in more:
            statement["Resource"] = "*"
        return json.dumps({"Version": "2012-10-17", "Statement": [statement]})

    @property
    def roles_taken_on(self):
        return self._asked["AssumeRole"]

    def connect(self, monkeypatch, keys=None, **extra):
        """Return the datastore, opened with an Airflow connection of type ``aws``."""
        services = {"s3": {"endpoint_url": self.url}, "sts": {"endpoint_url": self.url}}
        connection = {
            "conn_type": "aws",
            "login": (keys or self.worker)["AccessKeyId"],
            "password": (keys or self.worker)["SecretAccessKey"],
            "extra": {"region_name": REGION, "service_config": services, **extra},
        }
        monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps(connection))
        return open_datastore(DatastoreSpec(name="lake", url="s3://lake/team", conn_id="lake"))


@pytest.fixture(scope="module")
def cloud():
    for module in ("s3fs", "boto3", "moto.server"):
        try:
            __import__(module)
        except ImportError:
            missing(f"no {module}: pip install 'airflow-mlpipelines[s3]' 'moto[server]'")
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    try:
        url = "http://{}:{}".format(*running.get_host_and_port())
        cloud = Cloud(url, count_calls(running._server))
        say(f"{url}/moto-api/reset-auth", b"0")  # from now on signatures and policies count
        yield cloud
        say(f"{url}/moto-api/reset-auth", b"inf")
        say(f"{url}/moto-api/reset", b"")
    finally:
        running.stop()


def say(url, data):
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()


def count_calls(http_server):
    """Return a counter of what the server is asked for by an ``Action`` in the body."""
    import io

    counter, answer = Counter(), http_server.app

    def app(environ, start_response):
        if environ["REQUEST_METHOD"] == "POST" and environ["PATH_INFO"] == "/":
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            counter[urllib.parse.parse_qs(body.decode()).get("Action", [""])[0]] += 1
        return answer(environ, start_response)

    http_server.app = app
    return counter


@pytest.fixture
def made(tmp_path):
    root = tmp_path / "made"
    root.mkdir()
    (root / "small").write_text("hello")
    (root / "large").write_bytes(os.urandom(9 << 20))  # sent in parts, which s3fs does
    return root


def test_the_role_of_the_connection_is_taken_on(cloud, made, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="Check the credentials in its Airflow connection"):
        cloud.connect(monkeypatch).write_bytes("a.txt", b"1")
    before = cloud.roles_taken_on

    store = cloud.connect(monkeypatch, role_arn=cloud.role)
    artifact = commit_output(store, "out", made, step_run="r")
    stores, blobs = StoreSet([store], "lake"), BlobCache(tmp_path / "blobs")
    place = fetch(artifact, stores, blobs=blobs, target=tmp_path / "t")

    assert digest_tree(place).digest == artifact.digest == digest_tree(made).digest
    assert find_objects(store) is not None  # the quick way has the role too
    assert not find_objects(store)._refused
    assert cloud.roles_taken_on == before + 1

    cloud.connect(monkeypatch, role_arn=cloud.role).write_bytes("a.txt", b"1")
    assert cloud.roles_taken_on == before + 1  # its keys are good for an hour


def test_keys_that_run_out_are_renewed_while_the_work_goes_on(cloud, monkeypatch):
    # The shortest that AWS gives; botocore renews keys a quarter of an hour before they run out.
    short = {"role_arn": cloud.role, "assume_role_kwargs": {"DurationSeconds": 900}}
    store = cloud.connect(monkeypatch, **short)
    before = cloud.roles_taken_on

    for number in range(3):
        store.write_bytes("a.txt", str(number).encode())
        assert store.read_bytes("a.txt") == str(number).encode()

    assert cloud.roles_taken_on > before + 2


def test_an_agent_in_a_pod_takes_on_the_role_by_itself(cloud, made, monkeypatch):
    store = cloud.connect(monkeypatch, role_arn=cloud.role, external_id="of-the-team")

    elsewhere = open_described(json.loads(json.dumps(describe_store(store))))

    assert commit_output(elsewhere, "agent", made, step_run="r").files == 2
    assert store.read_bytes("agent/small") == b"hello"


def test_a_token_in_a_file_is_exchanged_for_the_role(cloud, monkeypatch, tmp_path, request):
    say(f"{cloud.url}/moto-api/reset-auth", b"inf")  # it takes no call without a signature
    request.addfinalizer(lambda: say(f"{cloud.url}/moto-api/reset-auth", b"0"))
    (tmp_path / "token").write_text("header.payload.signature\n")
    store = cloud.connect(
        monkeypatch,
        role_arn=cloud.role,
        assume_role_method="assume_role_with_web_identity",
        assume_role_with_web_identity_federation="file",
        assume_role_with_web_identity_token_file=str(tmp_path / "token"),
    )

    store.write_bytes("b.txt", b"1")

    assert store.read_bytes("b.txt") == b"1"
    assert cloud._asked["AssumeRoleWithWebIdentity"] == 1
    assert describe_store(store) is None  # the file is of this machine


def test_whoever_may_not_take_on_the_role_is_told_so(cloud, monkeypatch):
    store = cloud.connect(monkeypatch, keys=cloud.stranger, role_arn=cloud.role)

    with pytest.raises(DataError, match=r"datastore 'lake': .*sts:AssumeRole") as caught:
        store.write_bytes("a.txt", b"1")

    assert "Check the credentials in its Airflow connection" in str(caught.value)
    assert cloud.stranger["SecretAccessKey"] not in str(caught.value)
