"""What docs/guides/data.md shows of transfers."""

from __future__ import annotations

# [start transfer]
from airflow_mlpipelines import (
    DataReference,
    DataTransferStep,
    Pipeline,
    PythonScriptStep,
    Workspace,
)

ws = Workspace.from_config()
landing = DataReference(ws.datastores["partner"], "landing", "exports/flights")
lake = DataReference(ws.datastores["lake"], "flights", "raw/flights", overwrite=True)

fetch = DataTransferStep(
    name="fetch",
    source_data_reference=landing,
    destination_data_reference=lake,
)
flights = fetch.get_output()
count = PythonScriptStep("count.py", arguments=[flights], inputs=[flights], source_directory="code")

dag = Pipeline(ws, [count], name="flights_from_partner").to_dag()
# [end transfer]
