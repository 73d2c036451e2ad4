from __future__ import annotations

import pytest

from airflow_mlpipelines.definition.graph import (
    Argument,
    InputPart,
    LiteralPart,
    OutputPart,
    ParameterRef,
    ParameterValue,
)
from airflow_mlpipelines.runtime.contract import render_arguments, step_environment, to_text


def render(*arguments: Argument) -> list[str]:
    return render_arguments(
        arguments,
        inputs={"raw": "/in/raw"},
        outputs={"clean": "/out/clean"},
        parameters={"rate": 0.1, "text": "$(rm -rf) {{ x }}\n", "flag": True, "n": 10**20},
    )


def environment(
    *, params: dict[str, ParameterValue] | None = None, inputs: dict[str, str] | None = None
) -> dict[str, str]:
    return step_environment(
        run_id="mlp-1",
        step="train model",
        pipeline="churn",
        run_directory="/run",
        runtime="/runtime",
        inputs=inputs or {},
        outputs={"model": "/out/model"},
        params=params or {},
    )


def test_placeholders_become_paths_and_values() -> None:
    assert render(
        (LiteralPart(text="--in"),),
        (InputPart(name="raw"),),
        (LiteralPart(text="--out="), OutputPart(name="clean"), LiteralPart(text="/a.csv")),
        (ParameterRef(name="rate"),),
    ) == ["--in", "/in/raw", "--out=/out/clean/a.csv", "0.1"]


def test_a_value_is_one_argument_byte_for_byte() -> None:
    assert render((ParameterRef(name="text"),), (ParameterRef(name="n"),)) == [
        "$(rm -rf) {{ x }}\n",
        "100000000000000000000",
    ]


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="nope"):
        render((InputPart(name="nope"),))


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), (True, "True"), (False, "False"), (3, "3"), (0.1, "0.1"), (1e-07, "1e-07")],
)
def test_a_value_as_text(value: ParameterValue, text: str) -> None:
    assert to_text(value) == text


def test_a_step_is_told_everything_by_both_sets_of_names() -> None:
    assert environment(params={"rate": 0.5}, inputs={"raw": "/in/raw"}) == {
        "MLP_RUN_ID": "mlp-1",
        "MLP_STEP": "train model",
        "MLP_PIPELINE": "churn",
        "MLP_RUN_DIR": "/run",
        "MLP_INPUT_RAW": "/in/raw",
        "MLP_OUTPUT_MODEL": "/out/model",
        "MLP_PARAM_RATE": "0.5",
        "AZUREML_DATAREFERENCE_raw": "/in/raw",
        "AZUREML_DATAREFERENCE_model": "/out/model",
        "AML_PARAMETER_rate": "0.5",
        "PYTHONPATH": "/runtime",
        "PYTHONUNBUFFERED": "1",
    }


def test_names_that_differ_in_capitals_only_get_no_variable_in_capitals() -> None:
    variables = environment(inputs={"raw": "/a", "RAW": "/b", "other": "/c"})
    assert "MLP_INPUT_RAW" not in variables
    assert variables["MLP_INPUT_OTHER"] == "/c"
    assert variables["AZUREML_DATAREFERENCE_raw"] == "/a"
    assert variables["AZUREML_DATAREFERENCE_RAW"] == "/b"
