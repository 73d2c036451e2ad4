"""An S3 server that pods and the worker reach at the same address, and that tells who asked for what."""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.storage.stores import Store, open_store
from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

REGION = "eu-central-1"
_numbers = itertools.count()


@dataclass
class Lake:
    """A bucket on the server, which only its one user may read and write.

    Attributes:
        requests: Who asked, the method, and the key.
        slow: Seconds that pods wait for each object.
    """

    url: str
    client: Any
    host: str
    bucket: str
    key: str
    secret: str
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    slow: float = 0.0

    @property
    def root(self) -> str:
        return f"s3://{self.bucket}/team"

    def credentials(self, **changes: Any) -> dict[str, Any]:
        client = {"endpoint_url": self.url, "region_name": REGION}
        return {"key": self.key, "secret": self.secret, "client_kwargs": client, **changes}

    def store(self, name: str = "lake", **changes: Any) -> Store:
        return open_store(name, self.root, credentials=self.credentials(**changes))

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"team/{key}", Body=body)

    def get(self, key: str) -> bytes:
        found: bytes = self.client.get_object(Bucket=self.bucket, Key=f"team/{key}")["Body"].read()
        return found

    def keys(self) -> set[str]:
        listing = self.client.list_objects_v2(Bucket=self.bucket)
        return {item["Key"].removeprefix("team/") for item in listing.get("Contents", [])}

    def asked(self, method: str, *, by_pod: bool) -> list[str]:
        """Return the keys that pods, or else this machine, have read or written, in order."""
        start = f"/{self.bucket}/team/"
        return [
            path.removeprefix(start)
            for who, how, path in self.requests
            if how == method and path.startswith(start) and (who != self.host) == by_pod
        ]


@contextmanager
def serve_s3(host: str | None) -> Iterator[Lake]:
    """Give a bucket on a server at this address of the machine."""
    if host is None:
        missing("the address at which pods reach this machine is not known")
        raise AssertionError
    try:
        import boto3
        from moto.server import ThreadedMotoServer
    except ImportError:
        missing("no moto: pip install 'moto[server]' boto3")
        raise
    server = ThreadedMotoServer(host, 0, verbose=False)
    server.start()
    try:
        address, port = server.get_host_and_port()
        url = f"http://{address}:{port}"
        key, secret = make_user(url)
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name=REGION,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )
        bucket = f"lake-{next(_numbers)}"
        client.create_bucket(
            Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        lake = Lake(url, client, host, bucket, key, secret)
        running: Any = server._server
        answer = running.app

        def app(environ: Any, start_response: Any) -> Any:
            who, how, path = (environ[x] for x in ("REMOTE_ADDR", "REQUEST_METHOD", "PATH_INFO"))
            # WSGI has paths as Latin-1, whatever they are.
            lake.requests.append((who, how, path.encode("latin-1").decode()))
            if who != host and how == "GET" and path.startswith(f"/{bucket}/team/"):
                time.sleep(lake.slow)
            return answer(environ, start_response)

        running.app = app
        command(url, "reset-auth", b"0")  # from now on, signatures are checked
        yield lake
        command(url, "reset-auth", b"inf")
        command(url, "reset", b"")
    finally:
        server.stop()


def make_user(url: str) -> tuple[str, str]:
    """Return the keys of a user who may do anything with buckets."""
    import boto3

    root = {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
    iam = boto3.client("iam", endpoint_url=url, region_name=REGION, **root)
    iam.create_user(UserName="worker")
    policy = {"Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
    document = json.dumps({"Version": "2012-10-17", **policy})
    iam.put_user_policy(UserName="worker", PolicyName="all", PolicyDocument=document)
    pair = iam.create_access_key(UserName="worker")["AccessKey"]
    return pair["AccessKeyId"], pair["SecretAccessKey"]


def command(url: str, name: str, data: bytes) -> None:
    """Tell moto to change how it works."""
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{url}/moto-api/{name}", data=data, headers=headers)
    urllib.request.urlopen(request).close()
