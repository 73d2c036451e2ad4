"""Pods on images of a real registry that asks who one is: by digest, and built on the way."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.definition.graph import EnvironmentSpec, RegistrySpec
from airflow_mlpipelines.exceptions import StepFailedError
from tests.integration.docker.cli import docker_cli
from tests.integration.docker.registry import PASSWORD, USER, docker_config, registry
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep, step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.docker.registry import Registry
    from tests.integration.kubernetes.conftest import Cluster

pytestmark = [pytest.mark.kubernetes, pytest.mark.docker]
ROOT = Path(__file__).parents[3]
CONN_ID = "test_pod_registry"
WORKSPACE = """
name: test
registry: {{url: "{url}", conn_id: {conn_id}}}
datastores: {{store: {{url: data}}}}
computes:
  pods:
    type: kubernetes
    namespace: {namespace}
    in_cluster: false
    image: "{image}"
    image_pull_secrets: [{secret}]
"""
PIPELINE = """
from airflow_mlpipelines import CommandStep, Pipeline, PipelineData, Workspace

ws = Workspace.from_config()
made = PipelineData("made")
step = CommandStep(["sh", "-c", 'echo it is $TURN | tee "$0"', made], "tell", outputs=[made])
pipeline = Pipeline(ws, [step], name="in_pods")
"""
PULL_SECRET = "test-registry"
__all__ = ["registry", "step"]


@pytest.fixture
def shared(
    registry: Registry, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RegistrySpec]:
    """A repository of this test's own in a registry that the worker and the cluster's node may use."""
    if cluster.host_address is None:
        pytest.skip("this cluster's node can't be told where a registry of this machine is")
    hosts = cluster.kubeconfig.parent / "registries" / registry.address
    hosts.mkdir(parents=True)
    url = f"http://{cluster.host_address}:{registry.address.rpartition(':')[2]}"
    (hosts / "hosts.toml").write_text(
        f'server = "{url}"\n[host."{url}"]\ncapabilities = ["pull", "resolve"]\n'
    )
    secret = base64.b64encode(docker_config(registry.address).encode()).decode()
    cluster.create(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": PULL_SECRET},
            "type": "kubernetes.io/dockerconfigjson",
            "data": {".dockerconfigjson": secret},
        }
    )
    connection = {
        "conn_type": "docker",
        "host": registry.address,
        "login": USER,
        "password": PASSWORD,
    }
    monkeypatch.setenv(f"AIRFLOW_CONN_{CONN_ID.upper()}", json.dumps(connection))
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    try:
        yield RegistrySpec(url=f"{registry.address}/team/{uuid.uuid4().hex}", conn_id=CONN_ID)
    finally:
        cluster.core.delete_namespaced_secret(PULL_SECRET, cluster.namespace)
        shutil.rmtree(hosts)


def push_turn(registry: Registry, turn: str) -> str:
    """Put a small image that knows its turn into the registry, always under the same tag; return that."""
    name = f"{registry.address}/team/base:1"
    container = docker_cli("create", "busybox:1.36", "none")
    try:
        docker_cli("commit", f"--change=ENV TURN={turn}", container, name)
    finally:
        docker_cli("rm", container)
    registry.push_from_daemon(name)
    registry.forget()
    return name


def test_a_pod_is_pulled_by_the_digest_that_its_tag_had_when_the_run_was_planned(
    step: PodStep, registry: Registry, shared: RegistrySpec
) -> None:
    environment = EnvironmentSpec(image=push_turn(registry, "planned"))
    launcher = step.launcher(registry=shared, image_pull_secrets=(PULL_SECRET,))
    planned = launcher.resolve_environment(environment)
    assert planned.cacheable
    push_turn(registry, "moved")
    prepared = launcher.prepare_environment(environment, planned, emit=print)
    lines = step.run("sh", "-c", "echo $TURN", launcher=launcher, image=prepared.image)
    assert lines == ["planned"]


def test_an_image_that_the_registry_has_not_or_not_for_us_is_told_at_once(
    step: PodStep, registry: Registry, shared: RegistrySpec
) -> None:
    there = push_turn(registry, "there")
    absent = f"{registry.address}/team/no-such-401:1"
    for image, secrets, told in (
        (absent, (PULL_SECRET,), "not found"),
        (there, (), "401 Unauthorized|no basic auth|authorization failed"),
    ):
        launcher = step.launcher(image_pull_secrets=secrets)
        with pytest.raises(StepFailedError, match=f"{image}.*({told}).*image_pull_secrets") as no:
            step.python("", launcher=launcher, image=image)
        assert not no.value.retryable
        assert step.handle.get() is None


def test_a_node_pulls_with_the_connection_of_the_registry_for_as_long_as_the_pod_is_there(
    step: PodStep, registry: Registry, shared: RegistrySpec, cluster: Cluster
) -> None:
    image = push_turn(registry, uuid.uuid4().hex)  # no node has it yet
    environment = EnvironmentSpec(image=image)
    launcher = step.launcher(registry=shared, helper_image=image)
    planned = launcher.resolve_environment(environment)
    prepared = launcher.prepare_environment(environment, planned, emit=print)
    secrets: list[Any] = []

    def look() -> None:
        while not secrets:
            secrets.extend(step.look.secrets())
            time.sleep(0.05)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    lines = step.run(
        "sh", "-c", "echo $A", launcher=launcher, image=prepared.image, secrets={"A": "b"}
    )
    looking.join(timeout=5)
    assert lines == ["b"]
    [secret] = secrets
    assert secret.type == "kubernetes.io/dockerconfigjson"
    known = json.loads(base64.b64decode(secret.data[".dockerconfigjson"]))
    assert list(known["auths"]) == [registry.address]
    wait_until(lambda: not step.look.secrets(), "the Secret is gone with its pod")

    push_turn(registry, uuid.uuid4().hex)
    absent = launcher.resolve_environment(environment).image  # by digest: no node has this one
    with pytest.raises(StepFailedError, match="its name and tag, and the compute's image_conn_id"):
        step.run("true", launcher=step.launcher(), image=absent)


def call(folder: Path, *arguments: str) -> str:
    """Return what ``mlpipelines`` prints in a process of its own, on an Airflow of this test's own."""
    done = subprocess.run(
        [sys.executable, "-c", "from airflow_mlpipelines.cli import main; main()", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "AIRFLOW_HOME": str(folder / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(folder),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/airflow.db",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.airflow
def test_a_step_on_a_tagged_image_is_reused_until_the_tag_moves(
    cluster: Cluster,
    registry: Registry,
    shared: RegistrySpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    image = push_turn(registry, "one")
    (tmp_path / "mlpipelines.yaml").write_text(
        WORKSPACE.format(
            url=shared.url,
            conn_id=CONN_ID,
            namespace=cluster.namespace,
            image=image,
            secret=PULL_SECRET,
        )
    )
    (tmp_path / "in_pods.py").write_text(PIPELINE)
    assert "tell | it is one" in call(tmp_path, "run", "in_pods.py")
    assert "it is" not in (again := call(tmp_path, "run", "in_pods.py"))
    assert "reused" in again
    push_turn(registry, "two")
    [planned] = json.loads(call(tmp_path, "plan", "in_pods.py", "--json").splitlines()[-1])["steps"]
    assert planned["decision"] == "run"
    assert "image" in planned["reason"]


def test_an_environment_is_built_once_and_pods_pull_it_by_digest(
    step: PodStep, registry: Registry, shared: RegistrySpec
) -> None:
    base = push_turn(registry, "base")
    environment = EnvironmentSpec(
        name="own", dockerfile=f"FROM {base}\nRUN echo {uuid.uuid4().hex} on $TURN > /made\n"
    )
    launcher = step.launcher(registry=shared, image_pull_secrets=(PULL_SECRET,))
    definition = launcher.define_image(environment)
    told: list[str] = []
    try:
        resolved = launcher.resolve_environment(environment)
        assert launcher.is_prepared(environment, resolved) is False
        prepared = launcher.prepare_environment(environment, resolved, emit=told.append)
        assert prepared.digest == resolved.digest
        [line] = step.run("cat", "/made", launcher=launcher, image=prepared.image)
    finally:
        docker_cli("rmi", "-f", definition.name)
    assert line.endswith(" on base")
    assert str(prepared.image).startswith(f"{shared.url}@sha256:")
    assert f"Building image {definition.name} for environment 'own'. This is done once." in told
    assert any(line.startswith(f"Pushed image {shared.url}:") for line in told)

    # Where there is no daemon, what another machine has built is there all the same.
    without = step.launcher(registry=shared, docker_url="unix:///nowhere.sock")
    resolved = without.resolve_environment(environment)
    assert without.is_prepared(environment, resolved) is True
    again = without.prepare_environment(environment, resolved, emit=told.append)
    assert (again.image, again.digest) == (prepared.image, prepared.digest)
