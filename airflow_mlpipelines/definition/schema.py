"""Writes the JSON Schema of the graph: ``python -m airflow_mlpipelines.definition.schema FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from airflow_mlpipelines.definition.graph import PipelineGraph

if __name__ == "__main__":
    text = json.dumps(PipelineGraph.json_schema(), indent=2, sort_keys=True)
    Path(sys.argv[1]).write_text(f"{text}\n", encoding="utf-8")
