from __future__ import annotations

import pytest

from airflow_mlpipelines import DataReference, Pipeline, PipelineData, PipelineStep
from airflow_mlpipelines.definition.graph import InputPart, LiteralPart, OutputPart
from tests.unit.definition.sql_step import SqlStep


def test_a_step_type_of_one_s_own_is_a_step_like_any_other(ws):
    database = DataReference(ws.default_datastore, "flights_db", "flights.db")
    step = SqlStep("select 1", database=database, table=PipelineData("rows"), retries=2)

    spec = Pipeline(ws, [step]).graph.steps[0]

    assert (spec.type, spec.id, spec.retries) == ("SqlStep", "sql", 2)
    assert spec.operator == "airflow_mlpipelines.operators.steps:CommandOperator"
    assert spec.command[3:5] == (
        (InputPart(name="flights_db"),),
        (LiteralPart(text=".once "), OutputPart(name="rows")),
    )


def test_a_step_type_without_a_command_is_none():
    class Nothing(PipelineStep):
        pass

    with pytest.raises(TypeError, match="make_command"):
        Nothing("nothing")
