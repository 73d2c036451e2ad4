"""Count words, then report them: the smallest pipeline that shows reuse. An Airflow DAG file."""

from __future__ import annotations

# fmt: off
# [start pipeline]
from airflow_mlpipelines import Pipeline, PipelineData, PipelineParameter, PythonScriptStep, Workspace

ws = Workspace.from_config()
counts, report = PipelineData("counts"), PipelineData("report", pipeline_output_name="report")
top = PipelineParameter("top", 3, minimum=1)

count = PythonScriptStep(
    "count.py", arguments=["--out", counts], outputs=[counts], source_directory="first_pipeline"
)
publish = PythonScriptStep(
    "publish.py", arguments=["--counts", counts, "--top", top, "--out", report],
    inputs=[counts], outputs=[report], source_directory="first_pipeline",
)

dag = Pipeline(ws, [count, publish], name="first_pipeline").to_dag(schedule="@daily")
# [end pipeline]
