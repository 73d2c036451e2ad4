"""The contract with a step's program: its arguments, its environment variables, its run directory.

Between the worker and the program there are only these, and files: paths are handed over as arguments
and variables, metrics come back as numbered JSON lines (:mod:`airflow_mlpipelines.runtime.metrics`).
Nothing is pickled, and nothing is read out of what a program prints.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow_mlpipelines.definition.graph import Argument, ParameterValue

    Variables = Iterable[tuple[str, ParameterValue]]

RUN_ID = "MLP_RUN_ID"
PARENT_RUN_ID = "MLP_PARENT_RUN_ID"
STEP = "MLP_STEP"
PIPELINE = "MLP_PIPELINE"
RUN_DIRECTORY = "MLP_RUN_DIR"
INPUT_PREFIX = "MLP_INPUT_"
OUTPUT_PREFIX = "MLP_OUTPUT_"
PARAM_PREFIX = "MLP_PARAM_"
AZURE_DATA_PREFIX = "AZUREML_DATAREFERENCE_"
AZURE_PARAM_PREFIX = "AML_PARAMETER_"


def render_arguments(
    arguments: Iterable[Argument],
    *,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    parameters: Mapping[str, ParameterValue],
) -> list[str]:
    """Return argv with every placeholder replaced by its path or its value.

    A value becomes exactly one element of argv, or a part of one, byte for byte: it never passes a
    shell, and nothing in it is special.

    Raises:
        KeyError: A placeholder names an input, output or parameter that there is none of.
    """
    values = {"input": inputs, "output": outputs, "parameter": parameters}
    return [
        "".join(
            part.text if part.kind == "literal" else to_text(values[part.kind][part.name])
            for part in argument
        )
        for argument in arguments
    ]


def to_text(value: ParameterValue) -> str:
    """Return a parameter's value as programs get it: ``True``, ``3``, ``0.1``, or the text itself."""
    return value if isinstance(value, str) else repr(value)


def step_environment(  # noqa: PLR0913 - one argument for each thing that a program is told
    *,
    run_id: str,
    step: str,
    pipeline: str,
    run_directory: str,
    runtime: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    params: Mapping[str, ParameterValue],
    parent_run_id: str | None = None,
) -> dict[str, str]:
    """Return the environment variables of a step's process, by this package's names and Azure ML's.

    Ours have the name in capitals. Where two names differ in capitals only, neither gets one: the
    variable would be ambiguous. Azure ML's keep the name as it is.

    Args:
        run_id: The id of the step run.
        step: The name of the step.
        pipeline: The name of the pipeline, which is the run's experiment.
        run_directory: Where process and worker exchange files, as the process sees it.
        runtime: The directory with the runtime package, as the process sees it.
        inputs: Each input's name and path.
        outputs: Each output's name and path.
        params: The step's parameters.
        parent_run_id: The id of the pipeline's run.
    """
    variables = {
        RUN_ID: run_id,
        STEP: step,
        PIPELINE: pipeline,
        RUN_DIRECTORY: run_directory,
        "PYTHONPATH": runtime,
        # Lines shall reach the log when they are printed, not when a buffer is full.
        "PYTHONUNBUFFERED": "1",
    }
    if parent_run_id is not None:
        variables[PARENT_RUN_ID] = parent_run_id
    variables.update(_in_capitals(INPUT_PREFIX, inputs.items()))
    variables.update(_in_capitals(OUTPUT_PREFIX, outputs.items()))
    variables.update(_in_capitals(PARAM_PREFIX, params.items()))
    for name, path in (*inputs.items(), *outputs.items()):
        variables[AZURE_DATA_PREFIX + name] = path
    for name, value in params.items():
        variables[AZURE_PARAM_PREFIX + name] = to_text(value)
    return variables


def _in_capitals(prefix: str, items: Variables) -> dict[str, str]:
    named = [(name.upper(), value) for name, value in items]
    times = Counter(name for name, _ in named)
    return {prefix + name: to_text(value) for name, value in named if times[name] == 1}
