"""What the guide about GPUs shows does what it says, with a declared list of GPUs where the machine has none."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from airflow_mlpipelines.compute import local
from tests.dags.project import run_dag

pytestmark = [pytest.mark.airflow, pytest.mark.usefixtures("airflow_db")]

HERE = Path(__file__).parent


def test_the_step_of_the_guide_sees_the_two_gpus_of_its_compute(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPIPELINES_GPU_LOCKS", str(tmp_path / "locks"))
    # Ids that no machine has: where it shows GPUs of its own, a workspace's others are left out.
    monkeypatch.setattr(local, "machine_gpus", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlpipelines.yaml").write_text("name: gpus\n" + (HERE / "gpus.yaml").read_text())
    (tmp_path / "train").mkdir()
    seen = tmp_path / "seen"
    (tmp_path / "train" / "train.py").write_text(
        "import os, pathlib\n"
        f"pathlib.Path({str(seen)!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    (tmp_path / "gpus_dag.py").write_text((HERE / "gpus_dag.py").read_text())
    module = runpy.run_path(str(tmp_path / "gpus_dag.py"))

    assert run_dag(module["dag"]).state == "success"
    assert seen.read_text() == "GPU-6a1c,GPU-77d0"
    computes = module["ws"].compute_targets
    specs = {name: computes[name].spec for name in ("half", "nobody", "docker")}
    assert {name: spec.gpus for name, spec in specs.items()} == {
        "half": 4,
        "nobody": 0,
        "docker": 2,
    }
    assert computes["gke"].spec.gpu_type_label == "cloud.google.com/gke-accelerator"
