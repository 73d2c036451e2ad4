"""A pipeline whose step tracks with MLflow, as a DAG of airflow."""

from __future__ import annotations

from airflow_mlpipelines import Pipeline, PythonScriptStep, Workspace

ws = Workspace.from_config()
track = PythonScriptStep("track.py", name="track", source_directory="tracked")
dag = Pipeline(ws, [track], name="tracked").to_dag(schedule=None)
