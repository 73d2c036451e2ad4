"""What a tag means, asked of real registries: with a password, with tokens, for several processors, and away."""

from __future__ import annotations

import base64
import datetime
import json
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher
from airflow_mlpipelines.compute.registries import look_up_image
from airflow_mlpipelines.definition.graph import (
    EnvironmentSpec,
    KubernetesComputeSpec,
    RegistrySpec,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, EnvironmentBuildError
from tests.integration.docker.cli import docker_cli
from tests.integration.docker.registry import PASSWORD, USER, serve_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.docker.registry import Registry

pytestmark = pytest.mark.docker
CONN_ID = "test_images"
DOCKER_TYPES = "application/vnd.docker.distribution.manifest"


def set_connection(monkeypatch: pytest.MonkeyPatch, host: str, password: str = PASSWORD) -> None:
    connection = {"conn_type": "docker", "host": host, "login": USER, "password": password}
    monkeypatch.setenv(f"AIRFLOW_CONN_{CONN_ID.upper()}", json.dumps(connection))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))


@pytest.fixture
def _connection(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, registry.address)


@pytest.mark.usefixtures("_connection")
def test_a_tag_means_what_the_daemon_that_pushed_it_says(registry: Registry) -> None:
    registry.push("one")
    with registry.pulled() as repo_digest:
        found = look_up_image(registry.image, conn_ids=[CONN_ID])
        assert (found.reference, found.problem) == (repo_digest, None)
        assert found.reference.endswith(f"@{found.digest}")
    registry.push("two")
    assert look_up_image(registry.image, conn_ids=[CONN_ID]).digest != found.digest
    assert look_up_image(found.reference).digest == found.digest


@pytest.mark.usefixtures("_connection")
def test_an_image_for_several_processors_is_known_by_its_index(registry: Registry) -> None:
    registry.push("for one processor")
    repository = f"http://{registry.address}/v2/team/train/manifests"
    with httpx.Client(auth=(USER, PASSWORD), trust_env=False) as client:
        one = client.get(f"{repository}/1", headers={"Accept": f"{DOCKER_TYPES}.v2+json"})
        described = {
            "mediaType": one.headers["content-type"],
            "size": len(one.content),
            "digest": one.headers["docker-content-digest"],
        }
        platforms = [{"architecture": name, "os": "linux"} for name in ("amd64", "arm64")]
        index = {
            "schemaVersion": 2,
            "mediaType": f"{DOCKER_TYPES}.list.v2+json",
            "manifests": [{**described, "platform": platform} for platform in platforms],
        }
        put = client.put(
            f"{repository}/many",
            content=json.dumps(index),
            headers={"Content-Type": f"{DOCKER_TYPES}.list.v2+json"},
        )
    found = look_up_image(f"{registry.address}/team/train:many", conn_ids=[CONN_ID])
    assert found.digest == put.headers["docker-content-digest"] != described["digest"]


@pytest.mark.usefixtures("_connection")
def test_an_image_that_is_not_there_is_told(registry: Registry) -> None:
    name = f"{registry.address}/team/{uuid.uuid4().hex}:1"
    found = look_up_image(name, conn_ids=[CONN_ID])
    assert (found.reference, found.digest) == (name, None)
    assert found.problem == f"the registry {registry.address} has no image {name!r}"


def test_who_may_not_look_is_told_what_to_do(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = str(look_up_image(registry.image).problem)
    assert "(401)" in problem
    assert f"whose host is {registry.address}" in problem
    set_connection(monkeypatch, registry.address, "c4n4ry")
    problem = str(look_up_image(registry.image, conn_ids=[CONN_ID]).problem)
    assert f"the Airflow connection {CONN_ID!r} may not look there" in problem
    assert "c4n4ry" not in problem
    assert "'absent' with a registry's credentials does not exist" in str(
        look_up_image(registry.image, conn_ids=["absent"]).problem
    )


def test_a_registry_that_is_away_is_told_soon() -> None:
    began = time.monotonic()
    found = look_up_image("127.0.0.1:9/team/train:1")
    assert found.digest is None
    assert str(found.problem).startswith(
        "the registry 127.0.0.1:9 of image '127.0.0.1:9/team/train:1' does not answer: "
    )
    assert time.monotonic() - began < 30


@pytest.mark.usefixtures("_connection")
def test_a_registry_elsewhere_is_asked_over_plain_http_only_if_it_is_declared(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push("one")
    known = look_up_image(registry.image, conn_ids=[CONN_ID]).digest
    form = "{{(index .IPAM.Config 0).Gateway}}"
    machine = docker_cli("network", "inspect", "bridge", "--format", form)
    elsewhere = f"{machine}:{registry.address.rpartition(':')[2]}"
    set_connection(monkeypatch, elsewhere)
    fields: dict[str, Any] = {"url": f"{elsewhere}/team/env", "conn_id": CONN_ID}
    found = {}
    for insecure in (False, True):
        shared = RegistrySpec(**fields, insecure=insecure)
        compute = KubernetesComputeSpec(name="k", registry=shared)
        environment = EnvironmentSpec(image=f"{elsewhere}/team/train:1")
        found[insecure] = KubernetesLauncher(compute).resolve_environment(environment)
    assert not found[False].cacheable
    assert "name it as `registry` with `insecure: true`" in str(found[False].problem)
    assert found[True].description["digest"] == known


# ---- a registry that wants tokens --------------------------------------------------------------


@dataclass
class TokenService:
    """Gives out tokens as registries in the cloud do, to USER for pulling, to others for nothing."""

    server: ThreadingHTTPServer
    asked: list[dict[str, list[str]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/token"


@contextmanager
def serve_tokens(directory: Path) -> Iterator[TokenService]:
    """Run a token service whose certificate is ``directory/root.pem``."""
    import jwt
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "root.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
    credentials = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            service.asked.append(query)
            access = []
            if self.headers["Authorization"] == credentials:
                kind, repository, actions = query["scope"][0].split(":")
                access = [{"type": kind, "name": repository, "actions": actions.split(",")}]
            seconds = int(time.time())
            claims = {
                "iss": "tests", "sub": USER, "aud": query["service"][0], "jti": uuid.uuid4().hex,
                "iat": seconds, "nbf": seconds - 60, "exp": seconds + 600, "access": access,
            }  # fmt: skip
            token = jwt.encode(claims, key, algorithm="RS256", headers={"x5c": chain})
            body = json.dumps({"token": token}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = TokenService(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


def test_a_registry_that_wants_tokens_is_asked_with_one(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push("one")
    set_connection(monkeypatch, registry.address)
    known = look_up_image(registry.image, conn_ids=[CONN_ID]).digest
    with serve_tokens(tmp_path) as service:
        auth = f"token: {{realm: '{service.url}', service: images, issuer: tests, "
        auth += f"rootcertbundle: '{tmp_path}/root.pem'}}"
        with serve_registry(tmp_path, auth, data=registry.config / "data") as address:
            name = f"{address}/team/train:1"
            set_connection(monkeypatch, address)
            assert look_up_image(name, conn_ids=[CONN_ID]).digest == known
            assert service.asked == [
                {"service": ["images"], "scope": ["repository:team/train:pull"]}
            ]
            # Nobody gets a token too, but it is good for nothing.
            assert "nobody may without credentials" in str(look_up_image(name).problem)


# ---- for pods ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_connection")
def test_a_pod_runs_what_its_tag_meant_when_the_run_was_planned(registry: Registry) -> None:
    registry.push("planned")
    shared = RegistrySpec(url=f"{registry.address}/team/env", conn_id=CONN_ID)
    environment = EnvironmentSpec(image=registry.image)
    launcher = KubernetesLauncher(KubernetesComputeSpec(name="k", registry=shared))
    planned = launcher.resolve_environment(environment)
    assert planned.cacheable
    assert planned.image == f"{registry.address}/team/train@{planned.description['digest']}"
    registry.push("pushed while the run was on")
    now = launcher.resolve_environment(environment)
    assert now.digest != planned.digest
    recalled = launcher.recall_environment(environment, planned.description)
    assert recalled is not None
    assert (recalled.image, recalled.digest) == (planned.image, planned.digest)


def test_a_tag_that_can_not_be_looked_up_is_run_as_it_is(registry: Registry) -> None:
    registry.push("one")
    environment = EnvironmentSpec(image=registry.image)
    launcher = KubernetesLauncher(KubernetesComputeSpec(name="k"))
    resolved = launcher.resolve_environment(environment)
    assert (resolved.cacheable, resolved.image) == (False, registry.image)
    assert "image_conn_id" in str(resolved.problem)


@pytest.mark.usefixtures("_connection")
def test_what_can_not_be_built_for_pods_is_told_before_a_pod_is_made(registry: Registry) -> None:
    registry.push("a base")
    environment = EnvironmentSpec(name="own", dockerfile=f"FROM {registry.image}\nUSER 7\n")
    with pytest.raises(EnvironmentBuildError, match=r"none is named\. Write `registry: \{url: "):
        KubernetesLauncher(KubernetesComputeSpec(name="k")).resolve_environment(environment)

    url = f"{registry.address}/team/{uuid.uuid4().hex}"
    fields: dict[str, Any] = {"name": "k", "registry": RegistrySpec(url=url, conn_id=CONN_ID)}
    away = KubernetesLauncher(KubernetesComputeSpec(docker_url="unix:///nowhere.sock", **fields))
    resolved = away.resolve_environment(environment)
    assert resolved.cacheable
    with pytest.raises(ComputeUnavailableError) as error:
        away.prepare_environment(environment, resolved, emit=print)
    assert str(error.value).startswith(
        "environment 'own' is not in the registry yet, and can't be built here: compute 'k': the Docker daemon at "
        "unix:///nowhere.sock does not answer: there is no such socket."
    )
    assert str(error.value).endswith("`mlpipelines environment build`.")

    other = KubernetesLauncher(
        KubernetesComputeSpec(node_selector={"kubernetes.io/arch": "s390x"}, **fields)
    )
    with pytest.raises(EnvironmentBuildError, match=r"for amd64, .* but compute 'k' runs on s390x"):
        other.prepare_environment(environment, other.resolve_environment(environment), emit=print)


def test_the_password_of_one_registry_is_not_told_to_another(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="curious"')
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        set_connection(monkeypatch, registry.address)
        curious = f"127.0.0.1:{server.server_port}"
        assert look_up_image(f"{curious}/team/train:1", conn_ids=[CONN_ID]).digest is None
        assert seen == [None]
        set_connection(monkeypatch, curious)
        look_up_image(f"{curious}/team/train:1", conn_ids=[CONN_ID])
        assert str(seen[-1]).startswith("Basic ")
    finally:
        server.shutdown()
        server.server_close()
