"""Pipelines found in files, and parameters read from the command line."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.definition.graph import REGENERATE_ALL
from airflow_mlpipelines.definition.parameters import find_value_problem
from airflow_mlpipelines.definition.pipeline import collect_pipelines
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from airflow_mlpipelines.definition.graph import ParameterSpec
    from airflow_mlpipelines.definition.pipeline import Pipeline

_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def load_pipelines(file: Path) -> list[Pipeline]:
    """Return the pipelines that a Python file makes, in order.

    The file is executed as Airflow does it: as a module, with its folder on the path.

    Raises:
        DefinitionError: The file is not there, raises, or makes no pipeline.
    """
    file = file.expanduser().absolute()
    if not file.is_file():
        raise DefinitionError(f"{file} is not there")
    spec = importlib.util.spec_from_file_location(f"mlpipelines_file_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise DefinitionError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the module that they are in
    sys.path.insert(0, str(file.parent))
    try:
        with collect_pipelines() as found:
            spec.loader.exec_module(module)
    except DefinitionError:
        raise
    except (Exception, SystemExit) as error:
        if os.environ.get("MLPIPELINES_DEBUG"):
            raise
        raise DefinitionError(f"{file} raises {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
    if not found:
        raise DefinitionError(f"{file} makes no Pipeline")
    return found


def load_pipeline(file: Path, name: str | None) -> Pipeline:
    """Return the one pipeline of a file, or the one of this name or DAG id.

    Raises:
        DefinitionError: There are several and none is named, or there is none of this name.
    """
    pipelines = load_pipelines(file)
    names = [pipeline.name for pipeline in pipelines]
    if name is None:
        if len(pipelines) > 1:
            raise DefinitionError(
                f"{file} makes {len(pipelines)} pipelines: choose one with --pipeline, of "
                f"{list_options(names)}"
            )
        return pipelines[0]
    for pipeline in pipelines:
        if name in (pipeline.name, pipeline.dag_id):
            return pipeline
    raise DefinitionError(
        f"{file} makes no pipeline {name!r}, but {list_options(names)}.{suggest(name, names)}"
    )


def parse_parameters(pipeline: Pipeline, assignments: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``NAME=VALUE`` texts, as the parameters' types.

    Raises:
        DefinitionError: A text has another form, names no parameter, or has a value that is not allowed.
    """
    specs = {spec.name: spec for spec in pipeline.graph.parameters}
    values = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise DefinitionError(f"-p {assignment!r}: write NAME=VALUE")
        if name not in specs:
            raise DefinitionError(
                f"-p {assignment!r}: pipeline {pipeline.name!r} has no parameter {name!r}; it has "
                f"{list_options(specs)}.{suggest(name, specs)}"
            )
        values[name] = _parse_value(specs[name], text)
    return values


def _parse_value(spec: ParameterSpec, text: str) -> Any:
    try:
        value: Any = text
        if spec.type == "int":
            value = int(text)
        elif spec.type == "float":
            value = float(text)
        elif spec.type == "bool":
            value = _BOOLEANS[text.lower()]
    except (ValueError, KeyError):
        raise DefinitionError(
            f"-p {spec.name}={text!r}: the value is to be of type {spec.type}"
        ) from None
    problem = find_value_problem(spec, value)
    if isinstance(value, float) and not math.isfinite(value):
        problem = f"{value} is no finite number"  # neither JSON nor a bound has a place for it
    if problem is not None:
        raise DefinitionError(f"-p {spec.name}={text!r}: the value {problem}")
    return value


def parse_regenerate(pipeline: Pipeline, texts: Sequence[str] | None) -> list[str]:
    """Return step ids from ``--regenerate`` texts; commas separate several.

    Raises:
        DefinitionError: The pipeline has no such step.
    """
    names = [name.strip() for text in texts or () for name in text.split(",") if name.strip()]
    steps = [step.id for step in pipeline.graph.steps]
    for name in names:
        if name not in (REGENERATE_ALL, *steps):
            raise DefinitionError(
                f"--regenerate: pipeline {pipeline.name!r} has no step {name!r}; it has "
                f"{list_options(steps)}, and 'all' means every step.{suggest(name, steps)}"
            )
    return names


def print_json(data: Any) -> None:
    """Print JSON as one line on standard output, the last of the command."""
    print(json.dumps(data, default=str), flush=True)
