"""One operator class per step type, whatever the step runs on."""

from __future__ import annotations

from airflow_mlpipelines.operators.base import StepOperator


class PythonScriptOperator(StepOperator):
    """Runs a Python script in a copy of its source directory."""


class CommandOperator(StepOperator):
    """Runs any program. Step types of users' own run as this unless they name another operator."""
