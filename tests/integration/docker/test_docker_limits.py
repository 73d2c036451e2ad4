"""A container gets what the step asks for, and no more."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.docker import DockerLauncher
from airflow_mlpipelines.compute.docker import gpus as docker_gpus
from airflow_mlpipelines.compute.docker.container import make_container, plan_container
from airflow_mlpipelines.compute.docker.daemon import connect
from airflow_mlpipelines.compute.docker.gpu_claims import claim_gpus
from airflow_mlpipelines.definition.graph import DockerComputeSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import MLPipelinesError, StepFailedError
from tests.integration.docker.conftest import IMAGE, DockerStep, docker_cli, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.docker
MIB = 1024 * 1024


def inspect_running(step: DockerStep, **changes: Any) -> Mapping[str, Any]:
    """Return what the daemon says of the step's container while it runs."""
    launcher, thread, _ = step.run_in_thread(step.launch("sleep", "60", **changes))
    wait_until(lambda: step.status == "running", "the container runs")
    found = step.inspect()
    launcher.kill()
    thread.join(10)
    return found


def test_the_limits_are_those_of_the_step(step: DockerStep) -> None:
    resources = ResourcesSpec(cpus=0.5, memory=64 * MIB, shm_size=32 * MIB)
    host = inspect_running(step, resources=resources)["HostConfig"]
    assert host["NanoCpus"] == 500_000_000
    assert host["CpuShares"] == 0
    assert (host["Memory"], host["MemorySwap"]) == (64 * MIB, 64 * MIB)
    assert host["ShmSize"] == 32 * MIB
    assert host["Init"] is True


def test_a_step_without_limits_gets_those_of_its_compute(step: DockerStep) -> None:
    step.compute = DockerComputeSpec(
        name="d",
        image=IMAGE,
        cpus=1.5,
        memory=128 * MIB,
        network_mode="none",
        extra_hosts={"db": "10.0.0.7"},
    )
    host = inspect_running(step)["HostConfig"]
    assert (host["NanoCpus"], host["Memory"]) == (1_500_000_000, 128 * MIB)
    assert host["NetworkMode"] == "none"
    assert host["ExtraHosts"] == ["db:10.0.0.7"]


def test_a_step_sees_the_shared_memory_that_it_asked_for(step: DockerStep) -> None:
    program = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize)"
    lines = step.run(step.python(program, resources=ResourcesSpec(shm_size=200 * MIB)))
    assert lines == [str(200 * MIB)]


def test_a_step_out_of_memory_is_told_the_limit_and_the_remedy(step: DockerStep) -> None:
    launch = step.python(
        "print('before'); bytearray(300_000_000)", resources=ResourcesSpec(memory=64 * MIB)
    )
    with pytest.raises(StepFailedError, match=r"memory limit of 64 MiB.*memory=") as caught:
        step.run(launch)
    assert caught.value.exit_code == 137
    assert caught.value.log_tail == ("before",)
    assert not caught.value.retryable
    assert step.containers == []


@pytest.mark.parametrize("gpus", [2, ("GPU-6a1c", "GPU-77d0"), None])
def test_gpus_on_a_daemon_without_gpu_runtime_are_refused_in_words(
    step: DockerStep, gpus: int | tuple[str, ...] | None
) -> None:
    if "nvidia" in docker_cli("info", "--format", "{{json .Runtimes}}"):
        pytest.skip("this daemon has a GPU runtime")
    step.compute = DockerComputeSpec(name="d", image=IMAGE, gpus=gpus)
    with pytest.raises(
        StepFailedError, match=r"asks for 2 GPUs.*NVIDIA Container Toolkit"
    ) as caught:
        step.run(step.launch("touch", "/mlp/outputs/model", resources=ResourcesSpec(gpus=2)))
    assert not caught.value.retryable
    assert step.containers == []
    assert not list((step.root / "outputs").iterdir())


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (1, "asks for 1 GPUs.*NVIDIA Container Toolkit"),
        (("GPU-6a1c",), "asks for 1 GPUs.*NVIDIA Container Toolkit"),
        (("mlp.test/gpu=none",), "mlp.test/gpu=none.*nvidia-ctk cdi"),
    ],
)
def test_a_daemon_without_gpus_is_found_out_before_anything_is_made_for_the_step(
    step: DockerStep, gpus: int | tuple[str, ...], message: str
) -> None:
    if "nvidia" in docker_cli("info", "--format", "{{json .Runtimes}}"):
        pytest.skip("this daemon has a GPU runtime")
    launcher = DockerLauncher(DockerComputeSpec(name="d", image="mlp-test/nowhere:1", gpus=gpus))
    launcher.check_resources("train", ResourcesSpec(cpus=1))
    with pytest.raises(StepFailedError, match=message) as caught:
        launcher.check_resources("train", ResourcesSpec(gpus=1))
    assert not caught.value.retryable
    assert docker_cli("ps", "-a", "-q", "--filter", "name=mlp-gpu-probe") == ""


@pytest.mark.parametrize("program", ["true", "not-in-this-image"])
def test_a_daemon_that_starts_the_probe_is_believed(
    step: DockerStep, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(docker_gpus, "_PROBE_PROGRAM", program)
    # As one with NVIDIA's hook does, which says nothing of it: here, of a probe without a GPU.
    monkeypatch.setattr(docker_gpus, "device_requests", lambda *_: [])
    DockerLauncher(step.compute).check_resources("train", ResourcesSpec(gpus=1))
    assert docker_cli("ps", "-a", "-q", "--filter", "name=mlp-gpu-probe") == ""


@pytest.mark.parametrize(
    ("gpus", "request_"),
    [
        (4, ("", 0, ["0", "1"], [["gpu"]])),
        (("GPU-6a1c", "1", "2"), ("", 0, ["GPU-6a1c", "1"], [["gpu"]])),
        (
            ("nvidia.com/gpu=0", "nvidia.com/gpu=1"),
            ("cdi", 0, ["nvidia.com/gpu=0", "nvidia.com/gpu=1"], []),
        ),
    ],
)
def test_the_daemon_is_asked_for_the_gpus_of_the_step(
    step: DockerStep, gpus: int | tuple[str, ...], request_: tuple[Any, ...]
) -> None:
    compute = DockerComputeSpec(name="d", image=IMAGE, gpus=gpus)
    launch = step.launch("true", resources=ResourcesSpec(gpus=2))
    spec = plan_container(launch, compute, image_name=IMAGE, user="0:0")
    client = connect(compute)
    with claim_gpus(client, compute, launch, [spec.name], emit=print, cancelled=bool) as claim:
        spec = replace(spec, gpu_ids=claim.ids)
    make_container(spec, client, uid=0)  # removed by the fixture; never started
    (seen,) = step.inspect()["HostConfig"]["DeviceRequests"]
    kept = (seen["Driver"], seen["Count"], seen["DeviceIDs"], seen["Capabilities"])
    assert kept == request_


def test_more_cpus_than_the_host_has_are_refused_in_the_daemons_words(step: DockerStep) -> None:
    with pytest.raises(StepFailedError, match="Range of CPUs"):
        step.run(step.launch("true", resources=ResourcesSpec(cpus=(os.cpu_count() or 1) + 1)))
    assert step.containers == []


@pytest.mark.parametrize("user", ["1234:1234", "games"])
def test_what_a_step_writes_belongs_to_its_user(step: DockerStep, user: str) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give directories away")
    step.compute = DockerComputeSpec(name="d", image=IMAGE, user=user)
    (step.root / "code" / "train.py").write_text("")
    program = (
        "import os; open('/mlp/outputs/model', 'w'); open('outputs.txt', 'w'); open('/mlp/run/m', 'w');"
        "open('train.py', 'a').write('# edited'); print(os.getuid())"
    )
    (uid,) = step.run(step.python(program))
    made = [step.root / name for name in ("outputs/model", "code/outputs.txt", "run/m")]
    assert int(uid) != 0
    assert {path.stat().st_uid for path in made} == {int(uid)}


def test_a_bare_number_has_a_home_and_a_name(step: DockerStep) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give directories away")
    step.compute = DockerComputeSpec(name="d", image=IMAGE, user="1234")
    program = "import getpass, pathlib; (pathlib.Path.home() / '.cache').mkdir(); print(getpass.getuser())"
    assert step.run(step.python(program)) == ["mlp"]


def test_a_container_runs_as_the_worker_unless_told_otherwise(step: DockerStep) -> None:
    program = "import os; print(os.getuid(), os.getgid())"
    assert step.run(step.python(program)) == [f"{os.getuid()} {os.getgid()}"]


def test_inputs_can_not_be_written(step: DockerStep) -> None:
    program = "open('/mlp/inputs/table/table.csv', 'a')"
    with pytest.raises(StepFailedError, match="Read-only file system"):
        step.run(step.python(program))
    assert step.data.read_text() == "a,b\n1,2\n"


def test_only_the_input_itself_is_seen_and_not_what_lies_beside_it(step: DockerStep) -> None:
    (step.data.parent / "salaries.csv").write_text("secret")
    program = "import os; print(os.listdir('/mlp/inputs/table'))"
    assert step.run(step.python(program)) == ["['table.csv']"]


def test_the_entrypoint_of_an_image_does_not_come_before_the_step(step: DockerStep) -> None:
    image = f"{step.name}:entrypoint"
    source = docker_cli("create", IMAGE)
    docker_cli("commit", "--change", 'ENTRYPOINT ["echo", "entrypoint"]', source, image)
    docker_cli("rm", source)
    try:
        assert step.run(step.launch("echo", "step", image=image)) == ["step"]
    finally:
        docker_cli("rmi", "-f", image)


def test_a_program_that_is_not_there_is_named_and_not_tried_again(step: DockerStep) -> None:
    with pytest.raises(StepFailedError, match="'Rscript' can't be started") as caught:
        step.run(step.launch("Rscript", "train.R"))
    assert caught.value.exit_code == 127
    assert not caught.value.retryable
    assert step.containers == []


def test_a_directory_that_the_daemon_does_not_see_is_explained(step: DockerStep) -> None:
    launch = step.launch("true")
    step.data.unlink()
    with pytest.raises(StepFailedError, match="MLPIPELINES_WORK_DIR"):
        step.run(launch)
    assert step.containers == []


def test_an_image_that_is_nowhere_is_named(step: DockerStep) -> None:
    from airflow_mlpipelines.definition.graph import EnvironmentSpec

    launcher = DockerLauncher(step.compute)
    environment = EnvironmentSpec(image="mlp-test/no-such-image:1")
    resolved = launcher.resolve_environment(environment)
    assert not resolved.cacheable
    assert "mlp-test/no-such-image:1" in str(resolved.problem)
    with pytest.raises(MLPipelinesError, match="mlp-test/no-such-image:1"):
        launcher.prepare_environment(environment, resolved, emit=print)


def test_an_image_on_the_daemon_is_resolved_to_its_digest(step: DockerStep) -> None:

    launcher = DockerLauncher(step.compute)
    resolved = launcher.resolve_environment(None)
    image_id = docker_cli("images", "--no-trunc", "-q", IMAGE)
    digests = docker_cli("inspect", "--format", "{{json .RepoDigests}}", IMAGE)
    assert resolved.cacheable
    assert resolved.description["digest"] == image_id or resolved.description["digest"] in digests
    prepared = launcher.prepare_environment(None, resolved, emit=print)
    assert step.run(step.launch("echo", "ran", image=prepared.image)) == ["ran"]
