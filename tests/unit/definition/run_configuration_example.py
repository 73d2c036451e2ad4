"""What docs/guides/environments.md shows of run configurations; run by its test in an empty project."""

# [start save]
from __future__ import annotations

from airflow_mlpipelines import Environment, PythonScriptStep, Resources, RunConfiguration

config = RunConfiguration(
    target="gpu-cluster",
    environment=Environment("training", python_version="3.12", pip=["scikit-learn==1.5.2"]),
    resources=Resources(gpus=1, memory="16G"),
)
config.save("churn", "training")  # churn/.azureml/training.runconfig

config = RunConfiguration.load("churn", "training")
train = PythonScriptStep("train.py", source_directory="churn", runconfig=config)
# [end save]
