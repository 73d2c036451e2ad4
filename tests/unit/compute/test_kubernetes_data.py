"""What the pod of a step looks like whose data the agent carries, or that lie on a shared volume."""

from __future__ import annotations

import os
import subprocess
import tarfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines import KubernetesCompute
from airflow_mlpipelines.compute.base import Carriage, CarriedOutput, Stage, StepLaunch
from airflow_mlpipelines.compute.kubernetes import lifetime, volumes
from airflow_mlpipelines.compute.kubernetes.agent import add_agent, can_carry, staging_failure
from airflow_mlpipelines.compute.kubernetes.archive import make_entries
from airflow_mlpipelines.compute.kubernetes.detaching import (
    Awaited,
    PodWatch,
    Reason,
    judge,
    remember,
)
from airflow_mlpipelines.compute.kubernetes.pod import plan_pod, secret_manifest
from airflow_mlpipelines.compute.kubernetes.scripts import RECEIVE
from airflow_mlpipelines.compute.kubernetes.starting import StartErrors, start_failure
from airflow_mlpipelines.compute.kubernetes.volumes import mount_shared, works_with_stage
from airflow_mlpipelines.definition.graph import KubernetesComputeSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import (
    ComputeUnavailableError,
    DataError,
    DefinitionError,
    StepFailedError,
)
from airflow_mlpipelines.storage.stores import Store, open_store

if TYPE_CHECKING:
    from pathlib import Path

# [start agent]
cluster = KubernetesCompute(
    "gpu-cluster",
    namespace="ml",
    image="registry.example.com/ml/train:1",
    agent_image="registry.example.com/ml/mlpipelines-agent:0.1.0",
)
# [end agent]

# [start volumes]
shared = KubernetesCompute(
    "gpu-cluster",
    namespace="ml",
    image="registry.example.com/ml/train:1",
    shared_volumes={"/mnt/ml": "ml-data"},
)
# [end volumes]


def make_launch(root: Path, **changes: Any) -> StepLaunch:
    for name in ("code", "runtime", "run", "outputs", "data/folder"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "data" / "table.csv").write_text("a,b\n")
    (root / "data" / "folder" / "words").write_text("one")
    stage = Stage(
        root=root,
        code=root / "code",
        runtime=root / "runtime",
        run=root / "run",
        inputs={"table": root / "data" / "table.csv", "folder": root / "data" / "folder"},
        outputs={"model": root / "outputs" / "model"},
        outputs_root=root / "outputs",
    )
    fields: dict[str, Any] = {
        "step_run_id": "mlp-0123",
        "step_name": "train",
        "argv": ("python3", "train.py"),
        "env": {},
        "secrets": {},
        "stage": stage,
        "resources": ResourcesSpec(),
        "image": "train:1",
    }
    return StepLaunch(**fields | changes)


def plan(launch: StepLaunch, **fields: Any) -> Any:
    compute = KubernetesComputeSpec(name="cluster", **fields)
    return mount_shared(plan_pod(launch, compute, image_name="train:1"), launch, compute)


def mounts_of(planned: Any, name: str = "step") -> dict[str, dict[str, Any]]:
    spec = planned.manifest["spec"]
    found = next(c for c in (*spec["initContainers"], *spec["containers"]) if c["name"] == name)
    return {mount["mountPath"]: mount for mount in found["volumeMounts"]}


@pytest.fixture
def as_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is nobody in particular, and so is the step."""
    assert tmp_path.is_dir()  # pytest makes it as who it is
    monkeypatch.setattr(os, "getuid", lambda: 1234)


@pytest.fixture
def lake() -> Store:
    pytest.importorskip("s3fs")
    return open_store("lake", "s3://ml/x", credentials={"key": "k", "secret": "canary"})


# ---- shared volumes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("ml-data", "write {'/mnt/ml'"),
        ({"mnt/ml": "ml-data"}, "'mnt/ml' has to be the absolute path"),
        ({"/": "ml-data"}, "'/' has to be the absolute path"),
        ({"/mnt/../etc": "ml-data"}, "without '..'"),
        ({"/mnt/ml": "ML data"}, "'ML data', which is no PersistentVolumeClaim"),
        ({"/mnt/ml": "ml-data/../x"}, "no path inside one"),
        ({"/mnt/ml": None}, "None, which is no PersistentVolumeClaim"),
        ({"/mnt/ml": "a", "/mnt/ml/": "b"}, "'/mnt/ml' is named twice"),
    ],
)
def test_what_is_no_shared_volume_is_refused_while_the_file_is_parsed(value: Any, said: str):
    with pytest.raises(DefinitionError, match=r"compute 'x': shared_volumes") as failure:
        KubernetesCompute("x", shared_volumes=value)
    assert said in str(failure.value)


def test_shared_volumes_have_one_plain_form():
    made = KubernetesCompute("x", shared_volumes={"/mnt/ml/": "ml-data/", "/a": "b/c//d/"})
    assert made.spec.shared_volumes == {"/mnt/ml": "ml-data", "/a": "b/c/d"}


@pytest.mark.usefixtures("as_user")
def test_what_lies_on_a_volume_is_mounted_from_there_and_not_sent(tmp_path: Path):
    launch = make_launch(tmp_path)
    planned = plan(launch, shared_volumes={str(tmp_path / "data"): "lake/team"})
    mounts = mounts_of(planned)
    name = {"name": "mlp-shared-0", "readOnly": True}
    table, folder = "/mlp/inputs/table/table.csv", "/mlp/inputs/folder"
    assert mounts[table] == {**name, "mountPath": table, "subPath": "team/table.csv"}
    assert mounts[folder] == {**name, "mountPath": folder, "subPath": "team/folder"}
    assert mounts["/mlp/outputs"]["name"] == "mlp-workspace"
    assert planned.manifest["spec"]["volumes"][-1] == {
        "name": "mlp-shared-0",
        "persistentVolumeClaim": {"claimName": "lake"},
    }
    assert "mlp-shared-0" not in {mount["name"] for mount in mounts_of(planned, "stage").values()}
    sent = {info.name: (info.type, info.size) for info, _ in make_entries(launch.stage, planned)}
    assert sent["inputs/table/table.csv"] == (tarfile.REGTYPE, 0)
    assert sent["inputs/folder"] == (tarfile.DIRTYPE, 0)
    assert "inputs/folder/words" not in sent


@pytest.mark.usefixtures("as_user")
def test_a_step_with_all_on_volumes_is_alone_in_its_pod(tmp_path: Path):
    planned = plan(make_launch(tmp_path), shared_volumes={str(tmp_path): "ml-data"})
    spec = planned.manifest["spec"]
    assert [container["name"] for container in spec["containers"]] == ["step"]
    assert spec["initContainers"] == []
    mounts = mounts_of(planned)
    assert {path: mount.get("subPath") for path, mount in mounts.items()} == {
        "/mlp/home": None,
        "/mlp/code": "code",
        "/mlp/run": "run",
        "/mlp/runtime": "runtime",
        "/mlp/outputs": "outputs",
        "/mlp/inputs/table/table.csv": "data/table.csv",
        "/mlp/inputs/folder": "data/folder",
    }
    assert mounts["/mlp/runtime"]["readOnly"]
    assert "fsGroup" not in spec["securityContext"]


@pytest.mark.usefixtures("as_user")
def test_the_volume_mounted_deepest_counts(tmp_path: Path):
    volumes_ = {str(tmp_path): "outer", str(tmp_path / "data"): "inner"}
    mounts = mounts_of(plan(make_launch(tmp_path), shared_volumes=volumes_))
    claims = {"inner": "mlp-shared-0", "outer": "mlp-shared-1"}
    assert mounts["/mlp/inputs/folder"]["name"] == claims["inner"]
    assert mounts["/mlp/code"]["name"] == claims["outer"]


@pytest.mark.usefixtures("as_user")
def test_a_group_that_somebody_asks_for_is_left(tmp_path: Path):
    context = {"fsGroup": 7}
    planned = plan(
        make_launch(tmp_path), shared_volumes={str(tmp_path): "x"}, security_context=context
    )
    assert planned.manifest["spec"]["securityContext"]["fsGroup"] == 7


@pytest.mark.usefixtures("as_user")
def test_directories_that_can_not_be_handed_over_are_told(tmp_path: Path):
    planned = plan(
        make_launch(tmp_path),
        shared_volumes={str(tmp_path): "x"},
        security_context={"runAsUser": 77},
    )
    with pytest.raises(DataError, match=r"runs as user 77 .*this worker, as user 1234"):
        volumes.hand_over(planned)


def test_what_the_agent_commits_stays_with_it(tmp_path: Path, lake: Store, as_user: None):
    carriage = Carriage(outputs={"model": CarriedOutput(lake, "run/model", None)})
    planned = plan(make_launch(tmp_path, carriage=carriage), shared_volumes={str(tmp_path): "x"})
    assert mounts_of(planned)["/mlp/outputs"]["name"] == "mlp-workspace"
    assert planned.shared == {"inputs/table", "inputs/folder"}


def test_a_pod_that_may_still_write_to_a_volume_is_not_forgotten(monkeypatch: pytest.MonkeyPatch):
    deleted = []

    class Cluster:
        namespace = "ml"

        def delete(self, *_: Any, seconds: int, uid: str) -> None:
            deleted.append((seconds, uid))

    monkeypatch.setattr(lifetime, "await_removal", lambda *_, **__: False)
    claim = {"name": "x", "persistentVolumeClaim": {"claimName": "ml-data"}}
    pod = {"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [], "volumes": [claim]}}
    with pytest.raises(ComputeUnavailableError, match="may still write to a shared volume"):
        lifetime.remove_pod(Cluster(), pod)  # type: ignore[arg-type]
    assert deleted == [(lifetime.KILL_SECONDS, "u")]
    assert volumes.writes_in_place(pod)


def test_a_missing_claim_is_hopeless_after_a_while_and_named():
    said = '0/1 nodes are available: persistentvolumeclaim "ml-typo" not found. preemption: …'
    condition = {"type": "PodScheduled", "status": "False", "message": said}
    pod = {
        "metadata": {"name": "p"},
        "spec": {"containers": []},
        "status": {"phase": "Pending", "conditions": [condition]},
    }
    assert not StartErrors().is_hopeless(pod, 1.0)  # somebody may be making it
    assert StartErrors().is_hopeless(pod, 60.0)
    error = start_failure("train", pod, None, KubernetesComputeSpec(name="c", namespace="ml"))  # type: ignore[arg-type]
    assert "namespace 'ml' has no PersistentVolumeClaim 'ml-typo'" in str(error)
    assert isinstance(error, StepFailedError)
    assert not error.retryable


# ---- the agent -----------------------------------------------------------------------------------


def test_the_agent_carries_what_any_machine_can_open(lake: Store, tmp_path: Path):
    disk = open_store("disk", f"file://{tmp_path}")
    compute = KubernetesComputeSpec(name="c", agent_image="agent:1")
    assert can_carry(compute, lake)
    assert not can_carry(compute, disk)
    assert not can_carry(KubernetesComputeSpec(name="c"), lake)


def test_the_job_is_in_the_secret_and_no_credential_is_in_the_pod(tmp_path: Path, lake: Store):
    carriage = Carriage(outputs={"model": CarriedOutput(lake, "run/model", None)})
    launch = make_launch(tmp_path, carriage=carriage, secrets={"TOKEN": "hidden"})
    compute = KubernetesComputeSpec(name="c", agent_image="agent:1")
    spec = add_agent(plan_pod(launch, compute, image_name="train:1"), launch, compute)
    assert "canary" not in str(spec)
    assert "canary" not in str(spec.manifest)
    assert "canary" in spec.documents["job.json"]
    assert spec.needs_secret
    made = secret_manifest(spec, {"metadata": {"name": "p", "uid": "u"}})
    assert set(made["data"]) == {spec.key_of("0"), spec.key_of("job.json")}
    volume = next(item for item in spec.manifest["spec"]["volumes"] if item["name"] == "mlp-job")
    assert volume["secret"]["items"] == [{"key": spec.key_of("job.json"), "path": "job.json"}]
    assert "/mlp-job" not in mounts_of(spec)
    for helper in ("stage", "outputs"):
        assert mounts_of(spec, helper)["/mlp-job"]["readOnly"]


@pytest.mark.parametrize("is_taken_over", [True, False])
def test_what_the_agent_has_taken_over_is_not_sent_again(tmp_path: Path, is_taken_over: bool):
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / ("merging" if is_taken_over else "staged")).touch()
    (tmp_path / "code").mkdir()
    # A worker that is cut off at once: what it sends never arrives whole.
    done = subprocess.run(
        ["sh", "-c", RECEIVE, "sh", "512", "word"], cwd=tmp_path, input=b"", capture_output=True
    )
    assert done.returncode != 0
    assert (tmp_path / "code").exists() == is_taken_over
    assert not (tmp_path / "control" / "staged").exists()


def test_an_agent_that_takes_long_is_waited_for():
    watch = PodWatch(
        compute="c",
        namespace="ml",
        conn_id=None,
        in_cluster=None,
        selector="x",
        pods={"p": "u"},
        secret=None,
        awaits=Awaited.END,
        schedule_seconds=1.0,
        startup_seconds=1.0,
        timeout_seconds=1.0,
    )
    began = datetime(2026, 1, 1, tzinfo=UTC)
    stage: dict[str, Any] = {"name": "stage", "state": {"running": {}}}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": began.isoformat()}
    pod: dict[str, Any] = {
        "metadata": {"name": "p", "uid": "u", "creationTimestamp": began.isoformat()},
        "status": {"initContainerStatuses": [stage], "conditions": [scheduled]},
    }
    hours_later = began + timedelta(hours=3)
    assert judge(watch, {"p": pod}, hours_later, StartErrors()) is None
    stage["state"] = {"terminated": {"exitCode": 0, "finishedAt": began.isoformat()}}
    assert judge(watch, {"p": pod}, hours_later, StartErrors()) is Reason.UNSTARTED


def test_what_the_agent_said_of_a_pod_that_is_gone_is_its_error(tmp_path: Path):
    told = {"exitCode": 1, "reason": "Error", "message": '{"error": "the digest is another one"}'}
    pod = {
        "metadata": {"name": "p", "uid": "u"},
        "status": {
            "phase": "Failed",
            "initContainerStatuses": [{"name": "stage", "state": {"terminated": told}}],
        },
    }
    compute = KubernetesComputeSpec(name="cluster", image="train:1")
    spec = plan_pod(make_launch(tmp_path), compute, image_name="train:1")

    assert "the digest is another one" in str(start_failure("train", remember(pod), spec, compute))


@pytest.mark.usefixtures("as_user")
def test_directories_that_a_pod_works_with_are_known(tmp_path: Path):
    launch = make_launch(tmp_path)
    inputs, outputs = str(tmp_path / "data"), str(tmp_path / "outputs")
    assert not works_with_stage(launch.stage, plan(launch))
    for shared in (inputs, outputs, str(tmp_path)):
        assert works_with_stage(launch.stage, plan(launch, shared_volumes={shared: "ml-data"}))
    elsewhere = replace(launch.stage, root=tmp_path / "scratch")
    data = plan(replace(launch, stage=elsewhere), shared_volumes={inputs: "ml-data"})
    assert not works_with_stage(elsewhere, data)


@pytest.mark.parametrize("message", [None, "", "Traceback", '{"other": 1}', "[]"])
def test_only_the_agents_own_words_are_taken_for_its_error(message: str | None):
    assert staging_failure({"message": message}) is None
    assert str(staging_failure({"message": '{"error": "gone"}'})) == "gone"
