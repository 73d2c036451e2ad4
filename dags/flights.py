"""Which flights from New York arrive late? Two models side by side, and the better one reported.

An ordinary Airflow DAG: put this file and the folder ``flights`` beside it into your DAG folder.
"""

from __future__ import annotations

from airflow_mlpipelines import (
    Pipeline,
    PipelineData,
    PipelineParameter,
    PythonScriptStep,
    Workspace,
)

ws = Workspace.from_config()

test_month = PipelineParameter(
    "test_month",
    11,
    minimum=2,
    maximum=12,
    description="Train on the months before, test on this one.",
)
learning_rate = PipelineParameter(
    "learning_rate", 0.1, minimum=0.001, maximum=1.0, description="Of the boosted trees."
)
seed = PipelineParameter("seed", 7)

raw = PipelineData("raw", is_directory=True)
clean_flights = PipelineData("clean_flights")
table = PipelineData("table")
linear = PipelineData("linear", is_directory=True)
boosted = PipelineData("boosted", is_directory=True)
choice = PipelineData("choice", is_directory=True, pipeline_output_name="model")
report = PipelineData("report", is_directory=True, pipeline_output_name="report")

ingest = PythonScriptStep(
    "ingest.py", arguments=["--out", raw], outputs=[raw], source_directory="flights"
)
clean = PythonScriptStep(
    "clean.py",
    arguments=["--raw", raw, "--out", clean_flights],
    inputs=[raw],
    outputs=[clean_flights],
    source_directory="flights",
)
features = PythonScriptStep(
    "features.py",
    arguments=["--flights", clean_flights, "--raw", raw, "--out", table],
    inputs=[clean_flights, raw],
    outputs=[table],
    source_directory="flights",
)
train_linear = PythonScriptStep(
    "train.py",
    name="train_linear",
    arguments=[
        "--table", table, "--model", "linear", "--test-month", test_month, "--seed", seed, "--out", linear,
    ],
    inputs=[table],
    outputs=[linear],
    source_directory="flights",
)  # fmt: skip
train_boosted = PythonScriptStep(
    "train.py",
    name="train_boosted",
    arguments=[
        "--table", table, "--model", "boosted", "--learning-rate", learning_rate,
        "--test-month", test_month, "--seed", seed, "--out", boosted,
    ],
    inputs=[table],
    outputs=[boosted],
    source_directory="flights",
)  # fmt: skip
evaluate = PythonScriptStep(
    "evaluate.py",
    arguments=[
        "--table", table, "--models", linear, boosted, "--test-month", test_month, "--out", choice,
    ],
    inputs=[table, linear, boosted],
    outputs=[choice],
    source_directory="flights",
)  # fmt: skip
reporting = PythonScriptStep(
    "report.py",
    name="report",
    arguments=["--choice", choice, "--out", report],
    inputs=[choice],
    outputs=[report],
    source_directory="flights",
)

pipeline = Pipeline(
    ws,
    [ingest, clean, features, [train_linear, train_boosted], evaluate, reporting],
    name="flights",
    description="Predicts which flights from New York arrive late, on all flights of 2013.",
)
dag = pipeline.to_dag(schedule=None)
