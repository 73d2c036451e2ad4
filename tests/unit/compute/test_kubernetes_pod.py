"""What is asked of a cluster for a step, and what is sent to its pod; no cluster is needed."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines.compute.base import Stage, StepLaunch
from airflow_mlpipelines.compute.kubernetes.archive import (
    archive_size,
    make_entries,
    unpack,
    write_archive,
)
from airflow_mlpipelines.compute.kubernetes.channel import ChannelError
from airflow_mlpipelines.compute.kubernetes.pod import (
    label_value,
    plan_pod,
    pod_name,
    secret_manifest,
)
from airflow_mlpipelines.compute.kubernetes.template import lay_over, read_template
from airflow_mlpipelines.definition.graph import KubernetesComputeSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from pathlib import Path

GIBIBYTE = 1 << 30


def make_stage(root: Path) -> Stage:
    for name in ("code", "runtime", "run", "outputs"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return Stage(
        root=root,
        code=root / "code",
        runtime=root / "runtime",
        run=root / "run",
        inputs={},
        outputs={"model": root / "outputs" / "model"},
        outputs_root=root / "outputs",
    )


def make_launch(root: Path, **changes: Any) -> StepLaunch:
    fields: dict[str, Any] = {
        "step_run_id": "mlp-0123",
        "step_name": "train",
        "argv": ("python3", "train.py"),
        "env": {},
        "secrets": {},
        "stage": make_stage(root),
        "resources": ResourcesSpec(),
        "image": "train:1",
    }
    return StepLaunch(**fields | changes)


def plan(root: Path, launch: dict[str, Any] | None = None, **compute: Any) -> Any:
    spec = KubernetesComputeSpec(name="cluster", **compute)
    return plan_pod(make_launch(root, **launch or {}), spec, image_name="train:1")


def step_container(planned: Any) -> dict[str, Any]:
    found: dict[str, Any] = next(
        item for item in planned.manifest["spec"]["containers"] if item["name"] == "step"
    )
    return found


@given(st.text(min_size=1, max_size=300))
def test_any_id_becomes_a_name_and_a_label(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", pod_name(text))
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", label_value(text))


def test_two_ids_never_share_a_name() -> None:
    ids = ["a", "A", "a_", "a-", "a.b", "a b", "x" * 63, "x" * 64, "x" * 65]
    assert len({pod_name(each) for each in ids}) == len(ids)


def test_what_the_step_asks_for_goes_before_what_the_compute_says(tmp_path: Path) -> None:
    resources = ResourcesSpec(cpus=1.5, memory=2 * GIBIBYTE, gpus=2, gpu_type="A100")
    planned = plan(
        tmp_path,
        {"resources": resources},
        cpus=1,
        memory=GIBIBYTE,
        ephemeral_storage=5,
        gpu_resource="amd.com/gpu",
        node_selector={"zone": "a"},
    )
    wanted = {
        "cpu": "1500m",
        "memory": str(2 * GIBIBYTE),
        "ephemeral-storage": "5",
        "amd.com/gpu": "2",
    }
    assert step_container(planned)["resources"] == {"requests": wanted, "limits": wanted}
    spec = planned.manifest["spec"]
    assert spec["nodeSelector"] == {"zone": "a", "amd.com/gpu.product": "A100"}
    other = plan(
        tmp_path, {"resources": resources}, gpu_type_label="cloud.google.com/gke-accelerator"
    )
    assert other.manifest["spec"]["nodeSelector"] == {"cloud.google.com/gke-accelerator": "A100"}
    shm = next(item for item in spec["volumes"] if item["name"] == "mlp-shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": str(GIBIBYTE)}


def test_every_field_of_the_compute_reaches_the_pod(tmp_path: Path) -> None:
    toleration = {"key": "gpu", "operator": "Exists"}
    planned = plan(
        tmp_path,
        service_account="trainer",
        image_pull_secrets=("registry",),
        tolerations=(toleration,),
        affinity={"nodeAffinity": {}},
        priority_class="low",
        runtime_class="nvidia",
        labels={"team": "ml"},
        annotations={"note": "x"},
        queue="training",
        helper_image="alpine:3",
    )
    spec, meta = planned.manifest["spec"], planned.manifest["metadata"]
    assert spec["serviceAccountName"] == "trainer"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["tolerations"] == [toleration]
    assert spec["affinity"] == {"nodeAffinity": {}}
    assert (spec["priorityClassName"], spec["runtimeClassName"]) == ("low", "nvidia")
    assert meta["labels"]["team"] == "ml"
    assert meta["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert meta["annotations"]["note"] == "x"
    assert spec["initContainers"][0]["image"] == "alpine:3"


def test_whoever_asks_for_root_gets_it_and_nobody_else(tmp_path: Path) -> None:
    root = plan(tmp_path, security_context={"runAsUser": 0, "privileged": True})
    assert root.manifest["spec"]["securityContext"]["runAsNonRoot"] is False
    assert step_container(root)["securityContext"] == {"privileged": True}
    user = plan(tmp_path, security_context={"runAsUser": 7, "fsGroup": 8})
    assert user.manifest["spec"]["securityContext"]["runAsNonRoot"] is True
    assert user.manifest["spec"]["securityContext"]["fsGroup"] == 8
    assert step_container(user)["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_secrets_are_only_in_the_secret(tmp_path: Path) -> None:
    planned = plan(
        tmp_path, {"secrets": {"TOKEN": "canary-4711"}, "env": {"TOKEN": "overruled", "A": "$(B)"}}
    )
    assert "canary" not in repr(planned)
    assert "canary" not in str(planned.manifest)
    env = step_container(planned)["env"]
    key = planned.key_of("0")
    assert [item for item in env if item["name"] == "TOKEN"] == [
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "mlp-0123", "key": key}}}
    ]
    assert {"name": "A", "value": "$$(B)"} in env
    secret = secret_manifest(planned, {"metadata": {"name": "mlp-0123", "uid": "u"}})
    assert secret["data"] == {key: "Y2FuYXJ5LTQ3MTE="}
    assert secret["metadata"]["ownerReferences"][0]["uid"] == "u"


def test_nothing_is_taken_from_the_secret_of_an_earlier_launch(tmp_path: Path) -> None:
    def keys() -> set[str]:
        planned = plan(tmp_path, {"secrets": {"TOKEN": "canary-4711"}})
        return set(secret_manifest(planned, {"metadata": {"name": "mlp-0123", "uid": "u"}})["data"])

    assert not keys() & keys()


def test_a_template_is_kept_where_the_step_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "pod.yaml"
    file.write_text(
        "kind: Pod\n"
        "spec:\n"
        "  dnsPolicy: None\n"
        "  restartPolicy: Always\n"
        "  containers: [{name: base, image: x, tty: true}, {name: proxy, image: p}]\n"
        "  initContainers: [{name: prepare, image: i}]\n"
    )
    merged = lay_over(read_template(str(file)), plan(tmp_path).manifest)
    spec = merged["spec"]
    assert (spec["dnsPolicy"], spec["restartPolicy"]) == ("None", "Never")
    assert [item["name"] for item in spec["containers"]] == ["outputs", "step", "proxy"]
    assert [item["name"] for item in spec["initContainers"]] == ["prepare", "stage"]
    step = spec["containers"][1]
    assert (step["image"], step["tty"]) == ("train:1", True)


@pytest.mark.parametrize("text", [None, "kind: Job", "- a list", "kind: [Pod"])
def test_a_template_that_is_none_is_told(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "pod.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match="pod_template_file"):
        read_template(str(file))


def test_what_is_sent_has_the_size_that_was_said_and_all_of_the_stage(tmp_path: Path) -> None:
    launch = make_launch(tmp_path)
    stage = launch.stage
    deep = stage.code / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (deep / "ü").write_bytes(b"x" * 1000)
    (stage.code / "link").symlink_to("/mlp/inputs/table")
    (stage.code / "twin").hardlink_to(deep / "ü")
    (stage.code / "closed").write_text("secret")
    (stage.code / "closed").chmod(0)
    planned = plan_pod(launch, KubernetesComputeSpec(name="c"), image_name="x")
    entries = make_entries(stage, planned)
    data = b"".join(write_archive(entries))
    assert len(data) == archive_size(entries)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        unpack(archive, tmp_path / "there")
    there = tmp_path / "there" / "code"
    assert (there / ("d" * 120) / ("e" * 120) / "ü").read_bytes() == b"x" * 1000
    assert (there / "twin").read_bytes() == b"x" * 1000
    assert str((there / "link").readlink()) == "/mlp/inputs/table"
    assert (there / "closed").read_text() == "secret"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        "code", "home", "inputs", "outputs", "run", "runtime",
    ]  # fmt: skip


@pytest.mark.parametrize("trick", ["up", "absolute", "link", "hard"])
def test_nothing_that_a_pod_sends_is_written_elsewhere(tmp_path: Path, trick: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    target = tmp_path / "target"
    target.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"evil"))

        if trick == "up":
            add("../victim")
        elif trick == "absolute":
            add(str(victim))
        elif trick == "link":
            add("way", tarfile.SYMTYPE, str(tmp_path))
            add("way/victim")
        else:
            add("way", tarfile.LNKTYPE, "../victim")
            add("way")
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive, suppress(ChannelError):
        unpack(archive, target)
    assert victim.read_text() == "mine"


def test_importing_the_launcher_imports_neither_the_client_nor_its_provider() -> None:
    program = (
        "import sys, airflow_mlpipelines.compute.kubernetes\n"
        "print([n for n in ('kubernetes', 'airflow.providers', 'websocket') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
