"""A workspace of files in a temporary directory."""

from __future__ import annotations

import pytest

from airflow_mlpipelines import Workspace

CONFIG = """
name: churn
default_datastore: store
datastores:
  store: {url: data}
  other: {url: "memory://other"}
computes:
  local: {type: local}
  local-gpus: {type: local, gpus: [0, GPU-6a1c]}
  no-gpus: {type: local, gpus: 0}
  docker-gpus: {type: docker, image: "python:3.11-slim", gpus: [GPU-6a1c]}
  cpu-docker: {type: docker, image: "python:3.11-slim", cpus: 2, memory: 4G}
  gpu-cluster: {type: kubernetes, namespace: ml, image: "train:1", gpus: 2, max_nodes: 4}
environments:
  sklearn: {pip: ["scikit-learn==1.5.0"]}
"""


@pytest.fixture
def ws(tmp_path):
    """A workspace with three computes, beside a folder ``code`` of scripts."""
    (tmp_path / "mlpipelines.yaml").write_text(CONFIG)
    code = tmp_path / "code"
    code.mkdir()
    for name in ("prepare.py", "train.py", "report.py"):
        (code / name).write_text("print('hello')\n")
    return Workspace.from_config(tmp_path)


@pytest.fixture
def code(tmp_path):
    """The folder of scripts, as text."""
    return str(tmp_path / "code")
