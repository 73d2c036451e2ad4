"""Real PyTorch: processes of several nodes that come together in a group of its own, over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.local import LocalLauncher
from airflow_mlpipelines.definition.graph import LocalComputeSpec
from tests.gangs import launch_fields
from tests.integration.docker.conftest import IMAGE, docker_cli, image, step
from tests.parts import missing, require_torch
from tests.unit.compute.launcher_contract import Workbench

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.docker.conftest import DockerStep

__all__ = ["image", "step"]

# Nothing but what PyTorch's own documentation shows: all it is told is in the variables.
ALL_REDUCE = """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.full((1000,), float(dist.get_rank() + 1))
    dist.all_reduce(value)
    print("total", value.mean().item(), "of", dist.get_world_size(), flush=True)
    dist.destroy_process_group()
    """
TOTAL = {f"[rank {rank}] total 10.0 of 4" for rank in range(4)}


@pytest.fixture(scope="module")
def torch() -> Path:
    """A Python with PyTorch."""
    return require_torch()


def test_four_local_processes_of_two_nodes_reduce(tmp_path: Path, torch: Path) -> None:
    compute = LocalComputeSpec(name="local")
    bench = Workbench(tmp_path, lambda: LocalLauncher(compute), None, "mlp-test-torch")
    bench.write("work.py", ALL_REDUCE)
    spec = {"framework": "pytorch", "nodes": 2, "processes_per_node": 2, "parameter_servers": 0}
    gang = [sys.executable, "-m", "airflow_mlpipelines.runtime.gang", json.dumps(spec)]

    bench.run(argv=[*gang, "--", str(torch), "work.py"], nodes=2, timeout_seconds=400)

    assert set(bench.lines) >= TOTAL


@pytest.mark.docker
def test_processes_in_two_containers_reduce(step: DockerStep, torch: Path) -> None:
    own = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=True)
    if docker_cli("run", "--rm", IMAGE, "/usr/bin/python3", "-V") != own.stdout.strip():
        missing(f"the image {IMAGE} is of another distribution than this PyTorch")
    argv, fields = launch_fields(
        step.stage, step.root, ALL_REDUCE, processes=2, program="/mlp/inputs/torch/python"
    )
    fields["stage"] = replace(fields["stage"], inputs={"torch": torch.parent})

    lines = step.run(step.launch(*argv, **fields, timeout_seconds=400))

    assert set(lines) >= TOTAL
