"""Steps on several nodes, for tests: the same on Docker and on Kubernetes."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.runtime.rendezvous import Ports
from airflow_mlpipelines.runtime.stage import stage_runtime
from tests.integration.docker.cli import docker_cli
from tests.parts import missing

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.compute.base import Stage

MPI_IMAGE = "mlpipelines-tests/mpi:1"
_MPI = """
FROM python:3.11-slim
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \\
    openmpi-bin python3-mpi4py && rm -rf /var/lib/apt/lists/*
"""
WAIT = """
    import time
    print("begun", flush=True)
    time.sleep(600)
    """
FAIL_AT_3 = """
    import os, sys, time
    if os.environ["RANK"] == "3":
        sys.exit("out of data")
    time.sleep(600)
    """
HOG_AT_1 = """
    import os, time
    if os.environ["RANK"] == "1":
        hog = b"x" * (200 << 20)
    time.sleep(600)
    """
COUNT = """
    import time
    for i in range(40):
        print("line", i, flush=True)
        time.sleep(0.1)
    """
TELL_SECRET = """
    import os
    print("secret", os.environ["PASSWORD"][::-1], "MLP_GANG_TOKEN" in os.environ)
    """


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with Ports(count) as ports:
        return ports.numbers


def launch_fields(
    stage: Stage,
    root: Path,
    script: str,
    *,
    nodes: int = 2,
    processes: int = 1,
    framework: str = "pytorch",
    servers: int = 0,
    chief: bool = False,
    program: str = "python3",
    **changes: Any,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return argv and the other fields of the launch of a script, as a step with ``distributed=`` has them."""
    (stage.code / "work.py").write_text(textwrap.dedent(script))
    spec = {
        "framework": framework,
        "nodes": nodes,
        "processes_per_node": processes,
        "parameter_servers": servers,
        "chief": chief,
    }
    module = "airflow_mlpipelines.runtime.gang"
    argv = ("python3", "-m", module, json.dumps(spec), "--", program, "work.py")
    env = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": "/mlp/runtime",
        "MLP_RUN_DIR": "/mlp/run",
        **changes.pop("env", {}),
    }
    staged = replace(stage, runtime=stage_runtime(root / "runtime"))
    return argv, {"env": env, "nodes": nodes, "stage": staged, **changes}


def make_mpi_image(folder: Path) -> str:
    """Return an image with Open MPI and mpi4py, built once on this machine's daemon."""
    if not docker_cli("images", "-q", MPI_IMAGE):
        (folder / "Dockerfile").write_text(_MPI)
        build = ["docker", "build", "-q", "--network", "host", "-t", MPI_IMAGE, str(folder)]
        env = {**os.environ, "DOCKER_BUILDKIT": "0"}
        done = subprocess.run(build, env=env, capture_output=True, text=True, timeout=400)
        if done.returncode != 0:
            missing(f"no image with MPI can be built: {done.stderr[-500:]}")
    return MPI_IMAGE
