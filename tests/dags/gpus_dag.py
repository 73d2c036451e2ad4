"""What docs/guides/gpus.md shows."""

from __future__ import annotations

# [start step]
from airflow_mlpipelines import Pipeline, PythonScriptStep, Resources, Workspace

ws = Workspace.from_config()
train = PythonScriptStep(
    "train.py",
    resources=Resources(gpus=2),
    compute_target=ws.compute_targets["these"],
    source_directory="train",
)

dag = Pipeline(ws, [train], name="training_on_gpus").to_dag()
# [end step]
