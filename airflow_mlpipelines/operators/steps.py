"""One operator class per step type, whatever the step runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines.operators.base import StepOperator

if TYPE_CHECKING:
    from airflow_mlpipelines.execution.step import StepRunner


class PythonScriptOperator(StepOperator):
    """Runs a Python script in a copy of its source directory."""


class CommandOperator(StepOperator):
    """Runs any program. Step types of users' own run as this unless they name another operator."""


class DataTransferOperator(StepOperator):
    """Copies data between datastores, in the task's own process."""

    def runner_class(self) -> type[StepRunner]:
        """Return what moves data instead of launching a program."""
        from airflow_mlpipelines.execution.transfer import TransferRunner

        return TransferRunner
