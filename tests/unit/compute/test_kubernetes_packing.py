"""A step's small files in its pod's Secret: which they are, and what the pod makes of them."""

from __future__ import annotations

import base64
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airflow_mlpipelines.compute.base import Carriage
from airflow_mlpipelines.compute.kubernetes import packing
from airflow_mlpipelines.compute.kubernetes.agent import add_agent
from airflow_mlpipelines.compute.kubernetes.packing import (
    PACKED_NAME,
    awaits_files,
    is_packed,
    pack_files,
)
from airflow_mlpipelines.compute.kubernetes.pod import plan_pod, secret_manifest
from airflow_mlpipelines.compute.kubernetes.scripts import SHELL, UNPACK
from airflow_mlpipelines.definition.graph import KubernetesComputeSpec
from tests.unit.compute.test_kubernetes_data import make_launch, mounts_of, plan

OWNER = {"metadata": {"name": "p", "uid": "u"}}


@pytest.fixture
def launch(tmp_path: Path) -> Any:
    made = make_launch(tmp_path / "stage")
    (made.stage.code / "train.py").write_text("print('ü')")
    (made.stage.code / "run.sh").write_text("#!/bin/sh\n")
    (made.stage.code / "run.sh").chmod(0o755)
    (made.stage.code / "data").symlink_to("/mlp/inputs/table")
    return made


def unpack(spec: Any, place: Path) -> None:
    """Do what the container ``stage`` does, with the Secret that the cluster gets."""
    value = secret_manifest(spec, OWNER)["data"][spec.key_of(PACKED_NAME)]
    (place / "packed").write_bytes(base64.b64decode(value))
    workspace = place / "mlp"
    workspace.mkdir(exist_ok=True)
    command = [SHELL, "-c", UNPACK, SHELL, str(place / "packed")]
    subprocess.run(command, cwd=workspace, check=True)


def test_the_pod_unpacks_what_the_worker_has_packed(tmp_path: Path, launch: Any) -> None:
    spec = pack_files(plan(launch), launch.stage)
    for _ in range(2):  # a node that was restarted runs the container again
        unpack(spec, tmp_path)
    workspace = tmp_path / "mlp"
    assert (workspace / "code" / "train.py").read_text() == "print('ü')"
    assert os.access(workspace / "code" / "run.sh", os.X_OK)
    assert (workspace / "code" / "data").readlink() == Path("/mlp/inputs/table")
    assert (workspace / "inputs" / "table" / "table.csv").read_text() == "a,b\n"
    assert (workspace / "inputs" / "folder" / "words").read_text() == "one"
    for name in ("run", "runtime", "outputs", "home"):
        assert (workspace / name).is_dir()
    assert [path.name for path in (workspace / "control").iterdir()] == ["contact"]


def test_only_what_takes_the_files_gets_to_see_the_secret(launch: Any) -> None:
    planned = replace(plan(launch), secrets={"PASSWORD": "canary"})
    spec = pack_files(planned, launch.stage)
    assert is_packed(spec.manifest)
    assert mounts_of(spec, "stage")["/mlp-files"]["readOnly"]
    assert "/mlp-files" not in mounts_of(spec)
    assert "/mlp-files" not in mounts_of(spec, "outputs")
    volume = next(item for item in spec.manifest["spec"]["volumes"] if item["name"] == "mlp-files")
    # The step's own secrets are in the same Secret.
    assert [item["key"] for item in volume["secret"]["items"]] == [spec.key_of(PACKED_NAME)]
    held = {spec.key_of("0"), spec.key_of(PACKED_NAME)}
    assert set(secret_manifest(spec, OWNER)["data"]) == held


@pytest.mark.parametrize("size", [packing.LARGEST, 4 * packing.LARGEST, 16 * packing.LARGEST])
def test_what_is_large_is_sent_by_a_worker(launch: Any, size: int) -> None:
    (launch.stage.code / "weights").write_bytes(os.urandom(size))
    spec = pack_files(plan(launch), launch.stage)
    assert not is_packed(spec.manifest)
    assert PACKED_NAME not in spec.documents


def test_text_that_packs_well_may_be_larger(launch: Any) -> None:
    (launch.stage.code / "words").write_text("word " * (packing.LARGEST // 4))
    assert is_packed(pack_files(plan(launch), launch.stage).manifest)


def test_but_not_any_size(launch: Any) -> None:
    (launch.stage.code / "words").write_text("word " * (packing.LARGEST * 2))
    assert not is_packed(pack_files(plan(launch), launch.stage).manifest)


@pytest.mark.parametrize(
    ("stage_state", "awaits"),
    [
        ({"running": {}}, True),
        ({"terminated": {"exitCode": 0}}, False),
        ({"terminated": {"exitCode": 75}}, True),
    ],
)
def test_who_has_to_be_sent_files(launch: Any, stage_state: dict[str, Any], awaits: bool) -> None:
    status = {"initContainerStatuses": [{"name": "stage", "state": stage_state}]}
    assert awaits_files({**plan(launch).manifest, "status": status}) is awaits
    packed = pack_files(plan(launch), launch.stage).manifest
    assert not awaits_files({**packed, "status": status})


def test_an_agent_takes_them_besides_its_job(tmp_path: Path) -> None:
    launch = make_launch(tmp_path, carriage=Carriage())
    compute = KubernetesComputeSpec(name="cluster", agent_image="agent:1")
    spec = add_agent(plan_pod(launch, compute, image_name="train:1"), launch, compute)
    spec = pack_files(spec, launch.stage)
    [stage] = spec.manifest["spec"]["initContainers"]
    assert stage["command"][-3:] == ["stage", "/mlp-job/job.json", f"/mlp-files/{PACKED_NAME}"]
    assert set(spec.documents) == {"job.json", PACKED_NAME}


def test_a_steps_own_secrets_come_first(launch: Any) -> None:
    (launch.stage.code / "weights").write_bytes(os.urandom(packing.LARGEST // 2))
    planned = plan(launch)
    full = replace(planned, secrets={"KEYS": "x" * (900 << 10)})
    assert not is_packed(pack_files(full, launch.stage).manifest)
    assert is_packed(pack_files(planned, launch.stage).manifest)


def test_a_pod_that_mounts_all_of_its_files_needs_none(tmp_path: Path) -> None:
    launch = make_launch(tmp_path)
    spec = plan(launch, shared_volumes={str(tmp_path): "claim"})
    assert pack_files(spec, launch.stage) is spec
