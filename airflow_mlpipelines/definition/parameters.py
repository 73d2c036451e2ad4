"""Pipeline parameters: values that whoever starts a run may choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines._naming import DATA_NAME
from airflow_mlpipelines.definition.graph import (
    ParameterRef,
    ParameterSpec,
    ParameterType,
    ParameterValue,
)
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TYPES: dict[type, ParameterType] = {bool: "bool", int: "int", float: "float", str: "string"}


class PipelineParameter:
    """A value that a run may set; its type is that of the default.

    Args:
        name: Letters, digits and underscores.
        default_value: A string, int, float or bool, used where a run sets nothing.
        choices: The values allowed; None allows all.
        minimum: The least number allowed.
        maximum: The greatest number allowed.
        description: Shown in Airflow's trigger form.

    Raises:
        DefinitionError: The name is no name, the default is of another type or is not allowed itself.
    """

    def __init__(
        self,
        name: str,
        default_value: ParameterValue,
        *,
        choices: Sequence[ParameterValue] | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        description: str | None = None,
    ) -> None:
        where = f"PipelineParameter {name!r}"
        if not DATA_NAME.fullmatch(name):
            raise DefinitionError(
                f"{where}: a name is made of letters, digits and underscores, and starts with no digit"
            )
        kind = _TYPES.get(type(default_value))
        if kind is None:
            raise DefinitionError(
                f"{where}: the default is of type {type(default_value).__name__}; it can be a str, int, "
                "float or bool. Pass anything larger as data."
            )
        if kind not in ("int", "float") and (minimum is not None or maximum is not None):
            raise DefinitionError(f"{where}: only numbers have a minimum or a maximum")
        for choice in choices or ():
            if type(choice) is not type(default_value):
                raise DefinitionError(
                    f"{where}: choice {choice!r} is not of the default's type, {kind}"
                )
        self.spec = ParameterSpec(
            name=name,
            type=kind,
            default=default_value,
            choices=tuple(choices) if choices is not None else None,
            minimum=minimum,
            maximum=maximum,
            description=description,
        )
        problem = find_value_problem(self.spec, default_value)
        if problem is not None:
            raise DefinitionError(f"{where}: the default {problem}")

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    @property
    def default_value(self) -> ParameterValue:
        """The value where a run sets nothing."""
        return self.spec.default

    @property
    def ref(self) -> ParameterRef:
        """The place of its value in a graph."""
        return ParameterRef(name=self.name)

    def __repr__(self) -> str:
        return f"PipelineParameter({self.name!r}, {self.default_value!r})"


def find_value_problem(spec: ParameterSpec, value: ParameterValue) -> str | None:
    """Return why a parameter can't have this value, in words that follow "the value", or None."""
    if spec.choices is not None and value not in spec.choices:
        return f"{value!r} is not among {list(spec.choices)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if spec.minimum is not None and value < spec.minimum:
            return f"{value} is less than the minimum {spec.minimum}"
        if spec.maximum is not None and value > spec.maximum:
            return f"{value} is more than the maximum {spec.maximum}"
    return None
