"""What docs/guides/data.md shows of uploads."""

from __future__ import annotations

# [start uploads]
from airflow_mlpipelines import DataReference, Pipeline, PythonScriptStep, Workspace

ws = Workspace.from_config()
reports = DataReference(
    ws.datastores["lake"], "reports", "reports/latest", mode="upload", overwrite=True
)

write = PythonScriptStep(
    "report.py", arguments=["--to", reports], inputs=[reports], source_directory="code"
)

dag = Pipeline(ws, [write], name="reports").to_dag()
# [end uploads]
