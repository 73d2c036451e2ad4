"""Steps: the units of work that a pipeline is made of."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow_mlpipelines.definition.data import DataReference, InputBinding, PipelineData
from airflow_mlpipelines.definition.distributed import Distribution
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from airflow_mlpipelines.definition.computes import ComputeTarget
    from airflow_mlpipelines.definition.data import Handle
    from airflow_mlpipelines.definition.environment import Environment
    from airflow_mlpipelines.definition.graph import ParameterValue
    from airflow_mlpipelines.definition.parameters import PipelineParameter
    from airflow_mlpipelines.definition.resources import Resources
    from airflow_mlpipelines.definition.run_configuration import RunConfiguration

_OPERATORS = "airflow_mlpipelines.operators.steps"


class PipelineStep(ABC):
    """One unit of work; the base of all step types, also of your own.

    A step type of your own says what program runs: it implements :meth:`make_command`. The rest (data,
    reuse, compute, environment, retries) works as for every step.

    Args:
        name: Its name; names may repeat.
        arguments: What the program is called with: text, data handles (their paths), and
            :class:`PipelineParameter` (their values). Text may hold a handle's token, as in
            ``f"--in={raw}"``.
        inputs: Data that the step reads. Handles in ``arguments`` that other steps make count too.
        outputs: Data that the step makes.
        compute_target: Where it runs: an object, a name, or Azure ML's tuple of name and type. By
            default the workspace's default compute.
        source_directory: The folder with its files, relative to the pipeline's file; a copy of it is
            the process's working directory.
        params: Exported to the process as ``AML_PARAMETER_<name>`` and ``MLP_PARAM_<name>``.
        allow_reuse: Whether outputs of an equal, earlier step may be taken.
        version: A tag; changing it makes the step run again.
        environment: The software it runs on, or the name of one of the workspace's.
        resources: What it may use of its compute.
        distributed: :class:`Mpi`, :class:`PyTorch` or :class:`TensorFlow`: the program is started as several
            processes that find each other, and end together.
        retries: How often Airflow tries again after a failure; None leaves it to the DAG.
        retry_delay: Seconds before it does.
        timeout: Seconds after which the program is killed.
        code: ``closure`` looks at the files that the script reaches, to see whether it changed;
            ``folder`` at all of the source directory.
        ignore: Names of params and parameters that leave the outputs unchanged, such as a log level.
        environment_variables: Set for the process.
        secrets: Environment variable -> id of the Airflow connection whose password it gets.
        runconfig: Where and on what it runs, where the step itself does not say so.
        config: What a step type of your own needs beyond all this, as JSON; it counts for reuse.
        description: For people.
    """

    operator: ClassVar[str] = f"{_OPERATORS}:CommandOperator"
    """``module:Class`` of the Airflow operator that runs steps of this type."""
    script: str | None = None

    def __init__(
        self,
        name: str,
        *,
        arguments: Sequence[Any] | None = None,
        inputs: Sequence[Handle] | None = None,
        outputs: Sequence[PipelineData] | None = None,
        compute_target: ComputeTarget | str | tuple[str, str] | None = None,
        source_directory: str | Path | None = None,
        params: Mapping[str, ParameterValue | PipelineParameter] | None = None,
        allow_reuse: bool = True,
        version: str | None = None,
        environment: Environment | str | None = None,
        resources: Resources | None = None,
        distributed: Distribution | None = None,
        retries: int | None = None,
        retry_delay: float | None = None,
        timeout: float | None = None,
        code: Literal["closure", "folder"] = "closure",
        ignore: Sequence[str] = (),
        environment_variables: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        runconfig: RunConfiguration | None = None,
        config: Mapping[str, Any] | None = None,
        description: str | None = None,
    ) -> None:
        if runconfig is not None:
            _check_runconfig(name, runconfig)
            # What is None is left to it.
            compute_target = compute_target if compute_target is not None else runconfig.target
            environment = environment if environment is not None else runconfig.environment
            resources = resources if resources is not None else runconfig.resources
            distributed = distributed if distributed is not None else runconfig.distributed
            timeout = timeout if timeout is not None else runconfig.timeout
            environment_variables = {
                **runconfig.environment_variables,
                **(environment_variables or {}),
            }
        self.name = name
        self.arguments = list(arguments or ())
        self.inputs = _check_handles(name, "inputs", inputs)
        self.outputs = _check_handles(name, "outputs", outputs)
        self.compute_target = compute_target
        self.source_directory = source_directory
        self.params = dict(params or {})
        self.allow_reuse = allow_reuse
        self.version = version
        self.environment = environment
        self.resources = resources
        self.distributed = _check_distributed(name, distributed)
        self.retries = retries
        self.retry_delay = retry_delay
        self.timeout = timeout
        self.code: Literal["closure", "folder"] = code
        self.ignore = tuple(ignore)
        self.environment_variables = dict(environment_variables or {})
        self.secrets = dict(secrets or {})
        self.config = dict(config or {})
        self.description = description
        self.predecessors: list[PipelineStep] = []
        for data in self.outputs:
            if isinstance(data, PipelineData):
                data.producers.append(self)

    @abstractmethod
    def make_command(self) -> Sequence[Any]:
        """Return the program and its first arguments, in the forms that ``arguments`` takes.

        It stands before ``arguments``. It is called when the pipeline is defined, and has to return the
        same every time.
        """

    def run_after(self, *steps: PipelineStep) -> None:
        """Let this step wait for others, beyond those that it takes data from."""
        for step in steps:
            if not isinstance(step, PipelineStep):
                raise DefinitionError(
                    f"step {self.name!r}: run_after takes steps, not {type(step).__name__}"
                )
            if not any(step is known for known in self.predecessors):
                self.predecessors.append(step)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class PythonScriptStep(PipelineStep):
    """Runs ``python <script_name> <arguments>`` in a copy of the source directory.

    Args:
        script_name: The script, relative to the source directory.
        name: Its name; by default the script's.
        arguments: See :class:`PipelineStep`, as for all others.
    """

    operator = f"{_OPERATORS}:PythonScriptOperator"

    def __init__(
        self,
        script_name: str,
        name: str | None = None,
        arguments: Sequence[Any] | None = None,
        compute_target: ComputeTarget | str | tuple[str, str] | None = None,
        inputs: Sequence[Handle] | None = None,
        outputs: Sequence[PipelineData] | None = None,
        params: Mapping[str, ParameterValue | PipelineParameter] | None = None,
        source_directory: str | Path | None = None,
        allow_reuse: bool = True,
        version: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            name or script_name,
            arguments=arguments,
            compute_target=compute_target,
            inputs=inputs,
            outputs=outputs,
            params=params,
            source_directory="." if source_directory is None else source_directory,
            allow_reuse=allow_reuse,
            version=version,
            **options,
        )
        self.script = script_name
        self.uses_default_directory = source_directory is None

    def make_command(self) -> Sequence[Any]:
        """Return nothing: the interpreter and the script are put before the arguments at run time."""
        return ()


class CommandStep(PipelineStep):
    """Runs any program.

    Args:
        command: The program and its arguments, as a list; or as one text, which is split as a shell
            would split it, and never passed to one. Write ``["sh", "-c", …]`` where you want a shell.
        name: Its name; by default the program's.
    """

    def __init__(
        self,
        command: Sequence[Any] | str,
        name: str | None = None,
        compute_target: ComputeTarget | str | tuple[str, str] | None = None,
        inputs: Sequence[Handle] | None = None,
        outputs: Sequence[PipelineData] | None = None,
        params: Mapping[str, ParameterValue | PipelineParameter] | None = None,
        source_directory: str | Path | None = None,
        allow_reuse: bool = True,
        version: str | None = None,
        **options: Any,
    ) -> None:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        if not words:
            raise DefinitionError(f"CommandStep {name!r}: the command is empty")
        super().__init__(
            name or str(words[0]).rsplit("/", 1)[-1],
            compute_target=compute_target,
            inputs=inputs,
            outputs=outputs,
            params=params,
            source_directory=source_directory,
            allow_reuse=allow_reuse,
            version=version,
            **options,
        )
        self.command = words

    def make_command(self) -> Sequence[Any]:
        """Return the command."""
        return self.command


class StepSequence:
    """Steps in an order: each item waits for all of the one before it.

    Args:
        steps: Steps, or lists of steps that run side by side.
    """

    def __init__(self, steps: Sequence[Any] | None = None) -> None:
        self.steps = list(steps or ())


def _check_handles(step: str, what: str, handles: Sequence[Any] | None) -> list[Any]:
    if isinstance(handles, (str, DataReference, PipelineData, InputBinding)):
        raise DefinitionError(
            f"step {step!r}: {what} takes a list of data handles, as in {what}=[{type(handles).__name__}]"
        )
    return list(handles or ())


def _check_runconfig(step: str, runconfig: Any) -> None:
    from airflow_mlpipelines.definition.run_configuration import RunConfiguration

    if not isinstance(runconfig, RunConfiguration):
        raise DefinitionError(
            f"step {step!r}: runconfig takes a RunConfiguration, not {type(runconfig).__name__}. "
            "RunConfiguration.load(path, name) reads one from a file."
        )


def _check_distributed(step: str, distributed: Any) -> Distribution | None:
    if distributed is None or isinstance(distributed, Distribution):
        return distributed
    raise DefinitionError(
        f"step {step!r}: distributed takes Mpi(…), PyTorch(…) or TensorFlow(…), not {distributed!r}"
    )
