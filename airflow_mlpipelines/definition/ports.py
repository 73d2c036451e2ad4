"""A step's ports: what stands in its arguments for the places of its data."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from airflow_mlpipelines.definition.data import (
    TOKEN_PREFIX,
    DataReference,
    PipelineData,
    is_upload,
)
from airflow_mlpipelines.definition.graph import (
    Argument,
    ArgumentPart,
    InputPart,
    InputSpec,
    LiteralPart,
    OutputPart,
)
from airflow_mlpipelines.definition.ordering import find_handles

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.data import Handle
    from airflow_mlpipelines.definition.steps import PipelineStep

_TOKEN = re.compile(re.escape(TOKEN_PREFIX) + r"(\w+)")


class Ports:
    """The names under which a step's program knows its data."""

    def __init__(self, step: PipelineStep, inputs: dict[int, InputSpec]) -> None:
        made = {id(data): data for data in step.outputs if isinstance(data, PipelineData)}
        self._parts: dict[int, ArgumentPart] = {
            key: OutputPart(name=data.output_name) for key, data in made.items()
        }
        sent = {
            id(handle): handle
            for handle in (*step.inputs, *find_handles(step))
            if is_upload(handle)
        }
        self._parts |= {key: OutputPart(name=handle.name) for key, handle in sent.items()}
        self._outputs: dict[int, PipelineData | DataReference] = {**made, **sent}
        self._parts |= {key: InputPart(name=spec.name) for key, spec in inputs.items()}
        self._inputs = inputs

    @cached_property
    def _tokens(self) -> dict[str, ArgumentPart]:
        """The parts by the names that stand in tokens."""
        tokens = {data.name: self._parts[key] for key, data in self._outputs.items()}
        return tokens | {spec.name: self._parts[key] for key, spec in self._inputs.items()}

    def find(self, handle: Handle) -> ArgumentPart | None:
        """Return the part that stands for a handle, or None if the step has no such port."""
        return self._parts.get(id(handle))

    def split(self, text: str) -> Argument:
        """Return text as parts: handles' tokens in it stand for paths."""
        if TOKEN_PREFIX not in text:
            return (LiteralPart(text=text),)
        parts: list[ArgumentPart] = []
        position = 0
        for match in _TOKEN.finditer(text):
            name = self._longest(match[1])
            if name is None:
                continue
            if match.start() > position:
                parts.append(LiteralPart(text=text[position : match.start()]))
            parts.append(self._tokens[name])
            position = match.start(1) + len(name)
        if position < len(text):
            parts.append(LiteralPart(text=text[position:]))
        return tuple(parts)

    def _longest(self, word: str) -> str | None:
        """Return the longest port name that ``word`` begins with: text may go on after a token."""
        known = [name for name in self._tokens if word.startswith(name)]
        return max(known, key=len, default=None)
