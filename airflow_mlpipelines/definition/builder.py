"""From authoring objects to the graph, with every problem found on the way."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from airflow_mlpipelines._naming import (
    make_identifier,
    make_unique,
)
from airflow_mlpipelines.definition.checks import check_graph
from airflow_mlpipelines.definition.data import (
    TOKEN_PREFIX,
    DataReference,
    InputBinding,
    PipelineData,
    is_upload,
)
from airflow_mlpipelines.definition.graph import (
    Argument,
    ExternalDataSpec,
    InputSpec,
    LiteralPart,
    OutputSpec,
    ParameterRef,
    ParameterSpec,
    ParameterValue,
    PipelineGraph,
    ResourcesSpec,
    StepOutputRef,
    StepSpec,
    UploadSpec,
)
from airflow_mlpipelines.definition.ordering import CycleError, StepOrder, find_handles
from airflow_mlpipelines.definition.parameters import PipelineParameter
from airflow_mlpipelines.definition.ports import Ports
from airflow_mlpipelines.definition.resolution import WorkspaceResources
from airflow_mlpipelines.exceptions import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from airflow_mlpipelines.definition.graph import Mode
    from airflow_mlpipelines.definition.pipeline import Pipeline
    from airflow_mlpipelines.definition.steps import PipelineStep

RESERVED_IDS = frozenset({"cache_sensor", "finish"})
"""Ids of the tasks that stand around a pipeline's steps."""
_TOKEN = re.compile(re.escape(TOKEN_PREFIX) + r"(\w+)")
_MAX_NAME = 200
_NO_RESOURCES = ResourcesSpec()


def build_graph(pipeline: Pipeline) -> tuple[PipelineGraph | None, list[Problem]]:
    """Return the graph of a pipeline, and all its problems; None if there are steps in a circle."""
    order = StepOrder(pipeline.steps, resolve_closure=pipeline.resolve_closure)
    try:
        steps = order.sort()
    except CycleError as error:
        return None, [Problem(f"{error}. Remove one of the edges.", step=error.path[0].name)]
    return _Builder(pipeline, order, steps).build()


class _Builder:
    """Everything of one pipeline that its graph is made from."""

    def __init__(self, pipeline: Pipeline, order: StepOrder, steps: list[PipelineStep]) -> None:
        self._pipeline = pipeline
        self._order = order
        self._steps = steps
        self._ids = dict(zip(map(id, steps), make_step_ids(steps), strict=True))
        self._problems: list[Problem] = []
        self._resources = WorkspaceResources(pipeline.workspace, self._report)
        self._parameters: dict[str, ParameterSpec] = {}
        self._directories: dict[str | Path, str] = {}
        self._default_store = self._resources.find_datastore(pipeline.default_datastore, None, None)

    def build(self) -> tuple[PipelineGraph, list[Problem]]:
        """Return the graph and its problems."""
        pipeline = self._pipeline
        specs = [self._build_step(step) for step in self._steps]
        graph = PipelineGraph(
            name=pipeline.name,
            description=pipeline.description,
            workspace=pipeline.workspace.name,
            root=str(pipeline.root),
            default_datastore=self._default_store,
            datastores=self._resources.datastores,
            computes=self._resources.computes,
            parameters=tuple(self._parameters.values()),
            steps=tuple(specs),
        )
        return graph, [*self._problems, *check_graph(graph)]

    def _report(
        self, message: str, step: PipelineStep | None = None, port: str | None = None
    ) -> None:
        self._problems.append(Problem(message, step=step.name if step else None, port=port))

    # ---- steps -----------------------------------------------------------------------------

    def _build_step(self, step: PipelineStep) -> StepSpec:
        name: Any = step.name
        if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME:
            self._report(f"the name {step.name!r} is no text of 1 to {_MAX_NAME} characters", step)
        inputs = self._build_inputs(step)
        outputs = self._build_outputs(step)
        ports = Ports(step, inputs)
        return StepSpec(
            id=self._ids[id(step)],
            name=str(step.name),
            type=type(step).__name__,
            operator=step.operator,
            script=step.script,
            command=self._build_arguments(step, step.make_command(), ports),
            arguments=self._build_arguments(step, step.arguments, ports),
            source_directory=self._find_source_directory(step),
            inputs=tuple(inputs.values()),
            outputs=tuple(outputs),
            params=self._build_params(step),
            environment_variables=self._build_variables(step),
            secrets=step.secrets,
            compute=self._resources.find_compute(step),
            environment=self._resources.find_environment(step),
            resources=step.resources.spec if step.resources is not None else _NO_RESOURCES,
            distributed=step.distributed.spec if step.distributed is not None else None,
            allow_reuse=step.allow_reuse,
            version=step.version,
            code=step.code,
            ignore=step.ignore,
            run_after=tuple(
                dict.fromkeys(self._ids[id(item)] for item in self._order.waits_for(step))
            ),
            retries=step.retries,
            retry_delay_seconds=step.retry_delay,
            timeout_seconds=step.timeout,
            config=step.config,
            description=step.description,
        )

    def _find_source_directory(self, step: PipelineStep) -> str | None:
        chosen = step.source_directory
        if getattr(step, "uses_default_directory", False):
            chosen = self._pipeline.default_source_directory or "."
        if chosen is None:
            return None
        if chosen not in self._directories:
            self._directories[chosen] = _relative_to(self._pipeline.root, Path(chosen))
        return self._directories[chosen]

    def _build_variables(self, step: PipelineStep) -> dict[str, str]:
        variables: dict[str, Any] = step.environment_variables
        for name, value in variables.items():
            if not isinstance(value, str):
                self._report(
                    f"is {value!r}, but environment variables are text", step, f"variable {name!r}"
                )
        return {name: str(value) for name, value in step.environment_variables.items()}

    # ---- data ------------------------------------------------------------------------------

    def _build_inputs(self, step: PipelineStep) -> dict[int, InputSpec]:
        """Return the step's inputs by the identity of their handles; those in arguments count too."""
        made = {id(data) for data in step.outputs}
        inputs: dict[int, InputSpec] = {}
        named: dict[str, InputSpec] = {}
        for handle in (*step.inputs, *find_handles(step)):
            if id(handle) in inputs or (id(handle) in made and handle not in step.inputs):
                continue
            if is_upload(handle):
                continue
            spec = self._build_input(step, handle)
            if spec is None:
                continue
            known = named.setdefault(spec.name, spec)
            if known.source != spec.source:
                self._report(
                    "is the name of two inputs; rename one with as_input('other_name')",
                    step,
                    f"input {spec.name!r}",
                )
            inputs[id(handle)] = known
        return {key: spec for key, spec in inputs.items() if named[spec.name] is spec}

    def _check_path_on_compute(self, step: PipelineStep, path: str | None, port: str) -> None:
        if path is not None and not _is_below_working_directory(path):
            self._report(
                f"path_on_compute is {path!r}, but it must be a path below the step's working directory",
                step,
                port,
            )

    def _build_input(self, step: PipelineStep, handle: Any) -> InputSpec | None:
        path = getattr(handle, "path_on_compute", None)
        if path is not None:
            self._check_path_on_compute(step, path, f"input {handle.name!r}")
        if path is not None and handle.mode == "direct":
            self._report(
                "has a path_on_compute, but in mode 'direct' nothing is put there; drop one of the two",
                step,
                f"input {handle.name!r}",
            )
        if isinstance(handle, DataReference):
            port = f"input {handle.name!r}"
            source = ExternalDataSpec(
                name=handle.name,
                datastore=self._resources.find_datastore(handle.datastore, step, port),
                path=handle.path_on_datastore,
                pin=handle.pin,
            )
            return InputSpec(
                name=handle.name,
                source=source,
                mode=cast("Mode", handle.mode),
                path_on_compute=handle.path_on_compute,
            )
        if not isinstance(handle, (PipelineData, InputBinding)):
            self._report(
                f"{type(handle).__name__} can't be an input; DataReference and PipelineData can",
                step,
            )
            return None
        data = handle.data if isinstance(handle, InputBinding) else handle
        producer = self._find_producer(step, data)
        if producer is None:
            return None
        return InputSpec(
            name=handle.name,
            source=StepOutputRef(step=producer, output=data.output_name),
            mode=handle.mode if isinstance(handle, InputBinding) else "mount",
            path_on_compute=handle.path_on_compute if isinstance(handle, InputBinding) else None,
        )

    def _find_producer(self, step: PipelineStep, data: PipelineData) -> str | None:
        here = [item for item in data.producers if id(item) in self._ids]
        if not here:
            others = "" if not data.producers else " in this pipeline (resolve_closure is False)"
            self._report(
                f"no step makes it{others}: put it into the outputs of the step that does",
                step,
                f"input {data.name!r}",
            )
            return None
        return self._ids[id(here[0])]

    def _build_outputs(self, step: PipelineStep) -> list[OutputSpec]:
        outputs: dict[str, OutputSpec] = {}
        made: list[Any] = step.outputs
        for data in made:
            if not isinstance(data, PipelineData):
                self._report(f"{type(data).__name__} can't be an output; PipelineData can", step)
                continue
            port = f"output {data.output_name!r}"
            makers = [item for item in data.producers if id(item) in self._ids]
            if len(makers) > 1 and makers[0] is step:
                names = " and ".join(repr(item.name) for item in makers)
                self._report(
                    f"steps {names} both make it; give each its own PipelineData", step, port
                )
            if data.output_name in outputs:
                self._report("is the name of two outputs; rename one with output_name=", step, port)
            if data.output_path_on_compute is not None:
                self._report(
                    "output_path_on_compute is not supported: pass the PipelineData as an argument, and "
                    "write to the path that the program gets",
                    step,
                    port,
                )
            outputs[data.output_name] = OutputSpec(
                name=data.output_name,
                datastore=self._resources.find_datastore(
                    data.datastore or self._pipeline.default_datastore, step, port
                ),
                is_directory=data.is_directory,
                mode=data.output_mode,
                data_type=data.data_type,
                pipeline_output_name=data.pipeline_output_name,
            )
        return [*outputs.values(), *self._build_uploads(step, outputs)]

    def _build_uploads(
        self, step: PipelineStep, outputs: dict[str, OutputSpec]
    ) -> list[OutputSpec]:
        """Return the places that the step's files are uploaded to."""
        uploads: dict[str, OutputSpec] = {}
        read = {handle.name for handle in step.inputs if not is_upload(handle)}
        for handle in (*step.inputs, *find_handles(step)):
            if not is_upload(handle):
                continue
            port = f"upload {handle.name!r}"
            self._check_path_on_compute(step, handle.path_on_compute, port)
            upload = UploadSpec(
                path=handle.path_on_datastore,
                path_on_compute=handle.path_on_compute,
                overwrite=handle.overwrite,
            )
            datastore = self._resources.find_datastore(handle.datastore, step, port)
            spec = OutputSpec(
                name=handle.name,
                datastore=datastore,
                is_directory=True,
                mode="upload",
                upload=upload,
            )
            if handle.name in outputs or handle.name in read:
                self._report(
                    "is the name of another input or output too; rename one with data_reference_name=",
                    step,
                    port,
                )
            elif uploads.setdefault(handle.name, spec) != spec:
                self._report("is the name of two places; rename one", step, port)
        return list(uploads.values())

    # ---- arguments and parameters ----------------------------------------------------------

    def _build_arguments(
        self, step: PipelineStep, arguments: Iterable[Any], ports: Ports
    ) -> tuple[Argument, ...]:
        return tuple(self._build_argument(step, argument, ports) for argument in arguments)

    def _build_argument(self, step: PipelineStep, argument: Any, ports: Ports) -> Argument:
        if isinstance(argument, str):
            if "PipelineParameter(" in argument:
                self._report(
                    f"{argument!r} holds a PipelineParameter as text; pass the parameter as an argument "
                    "of its own",
                    step,
                    "arguments",
                )
            return ports.split(argument)
        if isinstance(argument, (bool, int, float, Path)):
            return (LiteralPart(text=str(argument)),)
        if isinstance(argument, PipelineParameter):
            return (self._use_parameter(step, argument),)
        part = ports.find(argument)
        if part is not None:
            return (part,)
        if not isinstance(argument, (DataReference, PipelineData, InputBinding)):
            self._report(
                f"{argument!r} of type {type(argument).__name__} can't be rendered; arguments are text, "
                "numbers, data handles and PipelineParameters",
                step,
                "arguments",
            )
        return (LiteralPart(text=str(argument)),)

    def _use_parameter(self, step: PipelineStep, parameter: PipelineParameter) -> ParameterRef:
        known = self._parameters.setdefault(parameter.name, parameter.spec)
        if known != parameter.spec:
            self._report(
                "is defined in two ways; use one PipelineParameter object in all steps",
                step,
                f"parameter {parameter.name!r}",
            )
        return parameter.ref

    def _build_params(self, step: PipelineStep) -> dict[str, ParameterValue | ParameterRef]:
        params: dict[str, ParameterValue | ParameterRef] = {}
        given: dict[str, Any] = dict(step.params)
        for name, value in given.items():
            if isinstance(value, PipelineParameter):
                params[name] = self._use_parameter(step, value)
            elif isinstance(value, (str, int, float, bool)):
                params[name] = value
            else:
                self._report(
                    f"is of type {type(value).__name__}; it can be text, a number, a bool or a "
                    "PipelineParameter",
                    step,
                    f"param {name!r}",
                )
        return params


def _relative_to(root: Path, chosen: Path) -> str:
    """Return a directory relative to the root where it lies inside, else absolute."""
    directory = (root / chosen.expanduser()).resolve()
    try:
        return directory.relative_to(root).as_posix()
    except ValueError:
        return str(directory)


def make_step_ids(steps: Sequence[PipelineStep]) -> list[str]:
    """Return a task id for each step: its name without ``.py``, made safe and unique."""
    wanted = [make_identifier(str(step.name).removesuffix(".py")) for step in steps]
    return make_unique(f"{name}_step" if name in RESERVED_IDS else name for name in wanted)


def _is_below_working_directory(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts
