"""Images for pods, built by a BuildKit daemon where the worker has no Docker daemon at all."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import subprocess
import uuid
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from airflow_mlpipelines.compute.buildkit import BuildkitDaemon
from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher
from airflow_mlpipelines.definition.graph import (
    EnvironmentSpec,
    KubernetesComputeSpec,
    RegistrySpec,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError, EnvironmentBuildError
from tests.integration.buildkit_server import serve_buildkit
from tests.integration.docker.registry import PASSWORD, USER
from tests.wheels import make_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.buildkit_server import Buildkit
    from tests.integration.docker.registry import Registry

pytestmark = pytest.mark.docker  # for the registry's images, and to look at what was built
CONN_ID = "test_buildkit_registry"


@pytest.fixture(scope="module")
def buildkit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildkit]:
    with serve_buildkit(tmp_path_factory.mktemp("buildkit")) as made:
        yield made


@pytest.fixture
def compute(
    buildkit: Buildkit, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> KubernetesComputeSpec:
    """A compute of a worker without a Docker daemon, with a repository of this test's own."""
    connection = {"conn_type": "docker", "host": registry.address, "login": USER}
    monkeypatch.setenv(
        f"AIRFLOW_CONN_{CONN_ID.upper()}", json.dumps({**connection, "password": PASSWORD})
    )
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")  # the worker has no Docker daemon
    monkeypatch.setenv("PATH", f"{buildkit.programs}{os.pathsep}{os.environ['PATH']}")
    shared = RegistrySpec(url=f"{registry.address}/team/{uuid.uuid4().hex}", conn_id=CONN_ID)
    return KubernetesComputeSpec(name="pods", buildkit_host=buildkit.host, registry=shared)


def push_base(registry: Registry, image: str) -> str:
    """Put an image of the daemon's into the registry, and return its name there."""
    name = f"{registry.address}/team/base:{uuid.uuid4().hex}"
    docker_with_login(registry, "tag", image, name)
    docker_with_login(registry, "push", name)
    docker_with_login(registry, "rmi", name)
    return name


def docker_with_login(registry: Registry, *arguments: str) -> str:
    """Return what the Docker command line prints, which has a daemon and may use the registry."""
    env = {**os.environ, "DOCKER_CONFIG": str(registry.config), "PATH": "/usr/local/bin:/usr/bin"}
    del env["DOCKER_HOST"]
    done = subprocess.run(
        ["docker", *arguments], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def prepare(compute: KubernetesComputeSpec, environment: EnvironmentSpec) -> tuple[str, list[str]]:
    launcher, lines = KubernetesLauncher(compute), list[str]()
    resolved = launcher.resolve_environment(environment)
    prepared = launcher.prepare_environment(environment, resolved, emit=lines.append)
    assert prepared.digest == resolved.digest
    return str(prepared.image), lines


def test_an_environment_is_built_pushed_and_found_again_without_any_docker_daemon(
    compute: KubernetesComputeSpec,
    registry: Registry,
    image: str,
    tmp_path: Path,
) -> None:
    make_wheel(tmp_path, "1.0")
    pip = ("--no-index", f"--find-links={tmp_path}", "tinypkg")
    base = push_base(registry, image)
    environment = EnvironmentSpec(name="tiny", image=base, pip=pip)
    built, lines = prepare(compute, environment)
    assert compute.registry is not None
    assert built.startswith(f"{compute.registry.url}@sha256:")
    assert any("Successfully installed tinypkg-1.0" in line for line in lines)
    assert "1 of 3 requirement lines name no exact version" in " ".join(lines)
    assert prepare(compute, environment) == (built, [])
    program = "import tinypkg; print(tinypkg.VERSION)"
    try:
        assert docker_with_login(registry, "run", "--rm", built, "python3", "-c", program) == "1.0"
    finally:
        docker_with_login(registry, "rmi", "-f", built)


def test_an_instruction_that_fails_is_told_with_the_end_of_its_log(
    compute: KubernetesComputeSpec, registry: Registry
) -> None:
    base = push_base(registry, "busybox:1.36")
    dockerfile = f"FROM {base}\nRUN echo one; exit 7\n"
    with pytest.raises(EnvironmentBuildError) as error:
        prepare(compute, EnvironmentSpec(name="e", dockerfile=dockerfile))
    assert error.value.instruction == "RUN echo one; exit 7"
    assert not error.value.retryable
    first, _, log = str(error.value).partition("\n")
    assert first == (
        "environment 'e' can't be built: it ended with exit code 7. "
        "The instruction was: RUN echo one; exit 7"
    )
    assert "one" in log


def test_who_may_not_push_is_told(compute: KubernetesComputeSpec) -> None:
    environment = EnvironmentSpec(name="e", dockerfile="FROM scratch\nENV A=1\n")
    context = KubernetesLauncher(compute).define_image(environment).context
    assert compute.registry is not None
    stranger = BuildkitDaemon("pods", str(compute.buildkit_host), None, [], insecure=False)
    with pytest.raises(EnvironmentBuildError, match="Nobody unknown may push there: name a"):
        stranger.build(
            context,
            reference=f"{compute.registry.url}:1",
            platform="amd64",
            labels={},
            named="environment 'e'",
            emit=print,
        )


def make_certificates(directory: Path) -> None:
    """Make what a daemon and its clients know each other by: ``ca.pem``, ``cert.pem`` and ``key.pem`` for both."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    for file in ("ca.pem", "cert.pem"):
        (directory / file).write_bytes(pem)
    (directory / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def test_a_daemon_that_wants_to_know_who_one_is_gets_a_certificate(
    compute: KubernetesComputeSpec, tmp_path: Path
) -> None:
    make_certificates(tmp_path)
    names = {"tlscacert": "ca.pem", "tlscert": "cert.pem", "tlskey": "key.pem"}
    options = [f"--{option}={tmp_path / file}" for option, file in names.items()]
    environment = EnvironmentSpec(name="e", dockerfile="FROM scratch\nENV A=1\n")
    with serve_buildkit(tmp_path, *options) as closed:
        stranger = compute.model_copy(update={"buildkit_host": closed.host})
        with pytest.raises(ComputeUnavailableError, match="does not answer"):
            prepare(stranger, environment)
        known = stranger.model_copy(update={"buildkit_tls": str(tmp_path)})
        assert "@sha256:" in prepare(known, environment)[0]


@pytest.mark.parametrize("without", ["daemon", "buildctl"])
def test_what_is_missing_is_told_with_what_to_do(
    compute: KubernetesComputeSpec,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    without: str,
) -> None:
    base = push_base(registry, "busybox:1.36")
    environment = EnvironmentSpec(name="e", dockerfile=f"FROM {base}\nRUN true\n")
    if without == "daemon":
        away = compute.model_copy(update={"buildkit_host": "tcp://127.0.0.1:9"})
        with pytest.raises(
            ComputeUnavailableError, match=r"at tcp://127\.0\.0\.1:9 does not answer"
        ):
            prepare(away, environment)
    else:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(EnvironmentBuildError, match="COPY --from=moby/buildkit"):
            prepare(compute, environment)
