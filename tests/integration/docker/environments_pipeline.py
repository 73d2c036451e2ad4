"""A pipeline whose step runs on packages of its own, in a container. Shown in docs/guides/environments.md."""

# [start pipeline]
from __future__ import annotations

from pathlib import Path

from airflow_mlpipelines import CommandStep, Environment, Pipeline, PipelineData, Workspace

ws = Workspace.from_config()
model = PipelineData("model")
training = Environment(
    "training",
    python_version="3.11",
    pip=["--no-index", f"--find-links={Path(__file__).parent / 'wheels'}", "tinypkg==1.0"],
    environment_variables={"LEVEL": "info"},
)
train = CommandStep(
    ["python3", "-c", "import sys, tinypkg; open(sys.argv[1], 'w').write(tinypkg.VERSION)", model],
    "train",
    outputs=[model],
    environment=training,
    compute_target="box",
)
pipeline = Pipeline(ws, [train], name="train_in_a_container")
# [end pipeline]
