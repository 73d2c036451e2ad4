"""Fingerprints: the digest of everything that determines what a step makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines.definition.graph import InputPart, LiteralPart, OutputPart, ParameterRef

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.definition.graph import Argument, ParameterValue, StepSpec

FINGERPRINT_KIND = "step-v1"
"""Changed to disown all entries that a faulty release wrote."""
ABSENT = "absent"
"""Stands for external data that was not there."""


@dataclass(frozen=True)
class Fingerprint:
    """A step's fingerprint, with what it was made of.

    Attributes:
        digest: 64 hex digits.
        ingredients: Groups ``step``, ``code``, ``environment``, ``parameters`` and ``inputs``. The code
            and the environment are digests, whose contents the index keeps. Of secrets there are only
            names, and of environment variables digests: people put passwords there.
    """

    digest: str
    ingredients: Mapping[str, Any]


def step_fingerprint(
    step: StepSpec,
    *,
    code: str | None,
    environment: str,
    parameters: Mapping[str, ParameterValue],
    inputs: Mapping[str, str | None],
    destinations: Mapping[str, str],
) -> Fingerprint:
    """Return the fingerprint under which the outputs of ``step`` are remembered.

    Two calls give the same one exactly when the program, its code, its environment, its arguments, the
    values of the parameters it uses and the content of its inputs are the same. Neither the step's
    name counts, nor its compute, resources or retries, nor the values of secrets, nor where inputs are.

    Args:
        step: The step.
        code: The digest of its code; None if it has no files of its own.
        environment: The digest of its environment.
        parameters: The run's parameters; only those that the step uses are looked at.
        inputs: Each input's digest; None for external data that is not there.
        destinations: Each datastore's URL. Where outputs go counts: workspaces that share an index, but
            no datastore, keep entries of their own.

    Raises:
        KeyError: A parameter or an input of the step is missing.
    """
    used = {name: parameters[name] for name in step.parameter_names if name not in step.ignore}
    params = {
        name: value
        for name, value in step.params.items()
        if not isinstance(value, ParameterRef) and name not in step.ignore
    }
    bound = {
        name: value.name for name, value in step.params.items() if isinstance(value, ParameterRef)
    }
    ingredients: dict[str, Any] = {
        "step": {
            "type": step.type,
            "script": step.script,
            "command": [_describe(argument) for argument in step.command],
            "arguments": [_describe(argument) for argument in step.arguments],
            "params": params,
            "bound_params": bound,
            "outputs": {
                item.name: [destinations[item.datastore], item.is_directory]
                for item in step.outputs
            },
            "environment_variables": {
                name: digest("variable-v1", value)
                for name, value in step.environment_variables.items()
            },
            "secrets": sorted(step.secrets),
            "version": step.version,
            "config": step.config,
        },
        "code": code,
        "environment": environment,
        "parameters": used,
        "inputs": {item.name: inputs[item.name] or ABSENT for item in step.inputs},
    }
    placed = {item.name: item.path_on_compute for item in step.inputs if item.path_on_compute}
    if placed:  # most have none, and keep the fingerprints of before there were any
        ingredients["step"]["input_paths"] = placed
    uploads = {
        item.name: [item.upload.path, item.upload.path_on_compute]
        for item in step.outputs
        if item.upload is not None
    }
    if uploads:  # files at another place are another effect
        ingredients["step"]["uploads"] = uploads
    if step.distributed is not None:  # the number of processes changes what they make
        fields = step.distributed.model_dump()
        if not fields["chief"]:  # most have none, and keep the fingerprints of before there was any
            del fields["chief"]
        ingredients["step"]["distributed"] = fields
    direct = sorted(item.name for item in step.inputs if item.mode == "direct")
    if direct:  # the program is given another thing than a path
        ingredients["step"]["direct_inputs"] = direct
    return Fingerprint(digest(FINGERPRINT_KIND, ingredients), ingredients)


def _describe(argument: Argument) -> list[list[str]]:
    """Return an argument with ports and parameters by name, as pairs of kind and text."""
    parts = []
    for part in argument:
        if isinstance(part, LiteralPart):
            parts.append(["literal", part.text])
        elif isinstance(part, (InputPart, OutputPart, ParameterRef)):
            parts.append([part.kind, part.name])
    return parts
