"""What is asked of a Docker daemon for a step, and what its failures come to, without a daemon."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines.compute.base import Stage, StepLaunch
from airflow_mlpipelines.compute.container_layout import container_paths
from airflow_mlpipelines.compute.docker import gpu_claims
from airflow_mlpipelines.compute.docker.container import (
    ContainerSpec,
    plan_container,
    secrets_archive,
)
from airflow_mlpipelines.compute.docker.failures import end_failure, format_bytes, start_failure
from airflow_mlpipelines.compute.docker.gpu_claims import claim_gpus
from airflow_mlpipelines.compute.docker.gpus import check_cdi_names, device_requests, has_runtime
from airflow_mlpipelines.compute.docker.images import (
    find_image,
    pull_image,
)
from airflow_mlpipelines.compute.docker.watch import ContainerEnd
from airflow_mlpipelines.compute.images import image_name
from airflow_mlpipelines.definition.graph import (
    DockerComputeSpec,
    EnvironmentSpec,
    KubernetesComputeSpec,
    ResourcesSpec,
)
from airflow_mlpipelines.exceptions import (
    ComputeUnavailableError,
    EnvironmentBuildError,
    StepFailedError,
)

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024
DIGEST = "sha256:" + "a" * 64


def make_stage(root: Path) -> Stage:
    (root / "table.csv.gz").write_text("x")
    (root / "images").mkdir()
    return Stage(
        root=root,
        code=root / "code",
        runtime=root / "runtime",
        run=root / "run",
        inputs={"table": root / "table.csv.gz", "images": root / "images"},
        outputs={"model": root / "outputs" / "model"},
        outputs_root=root / "outputs",
    )


def make_launch(root: Path, **changes: Any) -> StepLaunch:
    fields: dict[str, Any] = {
        "step_run_id": "mlp-1",
        "step_name": "train",
        "argv": ("python3", "train.py"),
        "env": {"A": "1"},
        "secrets": {},
        "stage": make_stage(root),
        "resources": ResourcesSpec(),
        "image": DIGEST,
        "labels": {"dag_id": "flights"},
    }
    return StepLaunch(**fields | changes)


def make_spec(
    root: Path, compute: DockerComputeSpec | None = None, **changes: Any
) -> ContainerSpec:
    compute = compute or DockerComputeSpec(name="d")
    user = str(changes.pop("user", "0:0"))
    return plan_container(
        make_launch(root, **changes), compute, image_name="python:3.11", user=user
    )


def api_error(status: int, said: str) -> Any:
    from docker.errors import APIError

    return APIError(
        said, response=SimpleNamespace(status_code=status, url="", reason=""), explanation=said
    )


def test_a_step_overrules_the_resources_of_its_compute(tmp_path: Path) -> None:
    compute = DockerComputeSpec(name="d", cpus=8, memory=100 * MIB, shm_size=10 * MIB)
    spec = make_spec(tmp_path, compute, resources=ResourcesSpec(cpus=0.5, memory=50 * MIB))
    assert (spec.cpus, spec.memory, spec.shm_size) == (0.5, 50 * MIB, 10 * MIB)


def test_the_gpus_of_a_compute_are_not_taken_by_steps_that_ask_for_none(tmp_path: Path) -> None:
    assert make_spec(tmp_path, DockerComputeSpec(name="d", gpus=4)).gpus == 0


@pytest.mark.parametrize(
    ("declared", "asked", "requests"),
    [
        (4, 2, [{"DeviceIDs": ["0", "1"], "Capabilities": [["gpu"]]}]),
        (None, 1, [{"DeviceIDs": ["0"], "Capabilities": [["gpu"]]}]),
        (("GPU-a", "1"), 2, [{"DeviceIDs": ["GPU-a", "1"], "Capabilities": [["gpu"]]}]),
        (("GPU-a", "GPU-b"), 1, [{"DeviceIDs": ["GPU-a"], "Capabilities": [["gpu"]]}]),
        (("nvidia.com/gpu=0",), 1, [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0"]}]),
        (("GPU-a",), 0, []),
        (4, None, []),
    ],
)
def test_gpus_are_asked_for_by_number_or_by_id(
    tmp_path: Path,
    declared: int | tuple[str, ...] | None,
    asked: int | None,
    requests: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute = DockerComputeSpec(name="d", gpus=declared)
    launch = make_launch(tmp_path, resources=ResourcesSpec(gpus=asked))
    monkeypatch.setenv("MLPIPELINES_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setattr(gpu_claims, "machine_gpus", list)
    with claim_gpus(
        SimpleNamespace(), compute, launch, ["mlp-1"], emit=print, cancelled=bool
    ) as claim:
        assert device_requests(asked or 0, claim.ids) == requests


CDI_0 = {"Source": "cdi", "ID": "nvidia.com/gpu=0"}


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"CDISpecDirs": None}, r"does not use the Container Device Interface"),
        ({"CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": None}, None),
        ({"CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": []}, "has found no devices"),
        (
            {"DiscoveredDevices": [CDI_0]},
            r"\['nvidia.com/gpu=1'\], but the .* has \['nvidia.com/gpu=0'\]",
        ),
        ({"DiscoveredDevices": [CDI_0, {**CDI_0, "ID": "nvidia.com/gpu=1"}]}, None),
    ],
)
def test_gpus_by_cdi_name_have_to_be_among_those_of_the_daemon(
    info: dict[str, Any], message: str | None
) -> None:
    names = ("nvidia.com/gpu=0", "nvidia.com/gpu=1")
    if message is None:
        check_cdi_names("train", info, names, "unix://x")
        return
    with pytest.raises(StepFailedError, match=message) as caught:
        check_cdi_names("train", info, names, "unix://x")
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("info", "known"),
    [
        ({"Runtimes": {"runc": {}}, "DiscoveredDevices": None}, False),
        (
            {"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "a/net=0"}]},
            False,
        ),
        ({"Runtimes": {"runc": {}, "nvidia": {}}}, True),
        ({"Runtimes": {"runc": {}}, "DiscoveredDevices": [CDI_0]}, True),
    ],
)
def test_what_a_daemon_says_of_itself_tells_of_gpus(info: dict[str, Any], known: bool) -> None:
    assert has_runtime(info) is known


@pytest.mark.parametrize(
    "said",
    [
        "nvidia-container-cli: device error: GPU-b: unknown device: unknown",
        "CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=7",
    ],
)
def test_a_gpu_that_the_host_lacks_is_named_and_not_tried_again(tmp_path: Path, said: str) -> None:
    spec = replace(make_spec(tmp_path, resources=ResourcesSpec(gpus=1)), gpu_ids=("GPU-b",))
    error = start_failure("train", api_error(500, said), spec, "unix://x")
    assert isinstance(error, StepFailedError)
    assert not error.retryable
    assert "asks for GPUs (GPU-b) that the host" in str(error)


def test_a_gpu_step_gets_half_of_its_memory_as_shared_memory(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, resources=ResourcesSpec(gpus=1, memory=100 * MIB))
    assert spec.shm_size == 50 * MIB


def test_inputs_and_the_runtime_are_mounted_read_only_and_nothing_else_is(tmp_path: Path) -> None:
    writable = {mount.target for mount in make_spec(tmp_path).mounts if not mount.read_only}
    assert writable == {"/mlp/code", "/mlp/run", "/mlp/outputs"}


def test_a_file_keeps_its_name_in_the_container(tmp_path: Path) -> None:
    paths = container_paths(make_stage(tmp_path), None)
    assert paths.inputs == {
        "table": "/mlp/inputs/table/table.csv.gz",
        "images": "/mlp/inputs/images",
    }
    assert paths.outputs == {"model": "/mlp/outputs/model"}


@pytest.mark.parametrize(
    ("user", "env", "home"),
    [
        ("1000:1000", {}, "/mlp/home"),
        ("1000", {"HOME": "/data"}, "/data"),
        ("0:0", {}, None),
        ("jovyan", {}, None),
    ],
)
def test_only_a_user_who_is_a_bare_number_is_given_a_home(
    tmp_path: Path, user: str, env: dict[str, str], home: str | None
) -> None:
    assert make_spec(tmp_path, user=user, env=env).env.get("HOME") == home


def test_secrets_are_not_in_what_is_shown_of_a_container(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, secrets={"TOKEN": "hunter2"})
    assert "hunter2" not in repr(spec)
    assert "TOKEN" not in spec.env


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_secret_reaches_the_program_byte_for_byte(value: str) -> None:
    with tarfile.open(fileobj=io.BytesIO(secrets_archive({"SECRET": value}, 1000))) as archive:
        member = archive.getmember("mlp/secrets/environment")
        content = archive.extractfile(member)
        assert content is not None
        script = content.read()
    assert (member.uid, member.mode) == (1000, 0o400)
    done = subprocess.run(
        ["/bin/sh", "-c", script + b'\nprintf %s "$SECRET"'], capture_output=True, check=True
    )
    assert done.stdout == value.encode()


def test_out_of_memory_names_the_limit_and_the_remedy_and_is_not_repeated(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, resources=ResourcesSpec(memory=64 * MIB))
    end = ContainerEnd({"ExitCode": 137, "OOMKilled": True})
    error = end_failure("train", end, spec, "unix://x", ["last line"])
    assert isinstance(error, StepFailedError)
    assert "memory limit of 64 MiB" in str(error)
    assert "memory=" in str(error)
    assert "last line" in str(error)
    assert not error.retryable


def test_a_program_killed_by_a_signal_says_which(tmp_path: Path) -> None:
    end = ContainerEnd({"ExitCode": 139, "OOMKilled": False})
    error = end_failure("train", end, make_spec(tmp_path), "unix://x", [])
    assert "exit code 139 (killed by SIGSEGV)" in str(error)


def test_a_container_lost_with_its_daemon_is_not_the_steps_failure(tmp_path: Path) -> None:
    end = ContainerEnd({"ExitCode": 137, "OOMKilled": False}, daemon_was_away=True)
    error = end_failure("train", end, make_spec(tmp_path), "unix://x", [])
    assert isinstance(error, ComputeUnavailableError)


@pytest.mark.parametrize(
    ("status", "said", "kind", "words"),
    [
        (
            500,
            'could not select device driver "" with capabilities: [[gpu]]',
            StepFailedError,
            "no GPU",
        ),
        (
            400,
            "invalid mount config for type: bind source path does not exist: /a",
            StepFailedError,
            "WORK_DIR",
        ),
        (400, "Range of CPUs is from 0.01 to 2.00", StepFailedError, "Range of CPUs"),
        (500, 'exec: "docker-init": executable file not found', ComputeUnavailableError, "tini"),
        (500, "no space left on device", ComputeUnavailableError, "no space left"),
    ],
)
def test_a_container_that_does_not_start_says_whose_fault_it_is(
    tmp_path: Path, status: int, said: str, kind: type[Exception], words: str
) -> None:
    error = start_failure("train", api_error(status, said), make_spec(tmp_path), "unix://x")
    assert isinstance(error, kind)
    assert words in str(error)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (
            "pull access denied for nope, repository does not exist",
            EnvironmentBuildError,
            "credentials",
        ),
        (
            "manifest for python:0.1 not found: manifest unknown",
            EnvironmentBuildError,
            "name and tag",
        ),
        ("dial tcp: lookup registry: no such host", ComputeUnavailableError, "way to the registry"),
    ],
)
def test_an_image_that_can_not_be_pulled_says_why(
    said: str, kind: type[Exception], words: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise api_error(500, said)

    client: Any = SimpleNamespace(pull=refuse)
    with pytest.raises(kind, match=words):
        pull_image(client, "nope", emit=print)


def test_a_pull_that_fails_on_the_way_is_an_error() -> None:
    client: Any = SimpleNamespace(pull=lambda *_, **__: iter([{"error": "unauthorized"}]))
    with pytest.raises(EnvironmentBuildError, match="unauthorized"):
        pull_image(client, "nope", emit=print)


def test_a_pull_reports_each_layer_once() -> None:
    messages = [
        {"status": "Pulling from library/python", "id": "3.11"},
        {"status": "Pulling fs layer", "id": "abc"},
        {"status": "Downloading", "id": "abc", "progress": "1/9"},
        {"status": "Downloading", "id": "abc", "progress": "9/9"},
        {"status": "Pull complete", "id": "abc"},
        {"status": "Pull complete", "id": "abc"},
    ]
    client: Any = SimpleNamespace(pull=lambda *_, **__: iter(messages))
    lines: list[str] = []
    pull_image(client, "python:3.11", emit=lines.append)
    assert lines == [
        "Pulling image python:3.11",
        "3.11: Pulling from library/python",
        "abc: Pulling fs layer",
        "abc: Pull complete",
        "Pulled image python:3.11",
    ]


def test_an_image_named_by_digest_needs_no_daemon() -> None:
    compute = DockerComputeSpec(name="d", docker_url="unix:///nowhere.sock")
    identity = find_image(f"ghcr.io/team/train@{DIGEST}", compute, timeout=1)
    assert (identity.digest, identity.problem) == (DIGEST, None)


def test_without_a_daemon_an_image_is_unknown_and_says_why() -> None:
    compute = DockerComputeSpec(name="gpu-box", docker_url="unix:///nowhere.sock")
    identity = find_image("python:3.11", compute, timeout=1)
    assert identity.digest is None
    assert identity.reference == "python:3.11"
    assert "'gpu-box'" in str(identity.problem)
    assert "unix:///nowhere.sock" in str(identity.problem)


def test_the_environment_names_the_image_before_the_compute_does() -> None:
    compute = DockerComputeSpec(name="d", image="python:3.11")
    assert image_name(EnvironmentSpec(image="torch:2"), compute) == "torch:2"
    assert image_name(EnvironmentSpec(environment_variables={"A": "1"}), compute) == "python:3.11"
    with pytest.raises(EnvironmentBuildError, match="has no image"):
        image_name(None, DockerComputeSpec(name="d"))


@pytest.mark.parametrize("fields", [{"pip": ("x",)}, {"apt": ("x",)}, {"dockerfile": "FROM x"}])
def test_pods_without_a_registry_never_run_the_base_of_what_has_to_be_built(
    fields: dict[str, Any],
) -> None:
    from airflow_mlpipelines.compute.kubernetes import KubernetesLauncher

    launcher = KubernetesLauncher(KubernetesComputeSpec(name="cluster", image="python:3.11"))
    with pytest.raises(
        EnvironmentBuildError, match=r"built for compute 'cluster', .* none is named"
    ):
        launcher.resolve_environment(EnvironmentSpec(**fields))


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (64 * MIB, "64 MiB"), (1536 * MIB, "1.5 GiB")]
)
def test_bytes_are_shown_in_the_unit_that_people_use(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_importing_the_launcher_imports_neither_docker_nor_its_provider() -> None:
    code = (
        "import sys, airflow_mlpipelines.compute.docker\n"
        "print([m for m in ('docker', 'airflow', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
