"""Handles of data: what is there before a run, and what passes between steps.

A handle in one step's outputs and another's inputs or arguments is the edge between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from airflow_mlpipelines._naming import DATA_NAME
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from airflow_mlpipelines.definition.graph import Mode, OutputMode, ReferenceMode
    from airflow_mlpipelines.definition.steps import PipelineStep
    from airflow_mlpipelines.definition.workspace import Datastore

TOKEN_PREFIX = "$AZUREML_DATAREFERENCE_"  # noqa: S105 - the marker of Azure ML, no secret


def _check_name(kind: str, name: str) -> str:
    if not DATA_NAME.fullmatch(name):
        raise DefinitionError(
            f"{kind} {name!r}: a name is made of letters, digits and underscores, and starts with no "
            "digit: it becomes part of an environment variable"
        )
    return name


class DataReference:
    """Data that is on a datastore before the pipeline runs, or with ``mode="upload"`` a place for a step's files.

    As text it is the token ``$AZUREML_DATAREFERENCE_<name>``, which an argument may hold; the step's
    process gets the path in its place.

    Args:
        datastore: The datastore.
        data_reference_name: Its name in the pipeline; by default the datastore's.
        path_on_datastore: The file or directory; by default the datastore's root.
        mode: ``mount`` for the data in place, read-only; ``download`` for a copy of the step's own;
            ``direct`` for their address, which the program opens by itself; ``upload`` for an empty directory,
            whose files are uploaded to this place once the step has succeeded.
        path_on_compute: Where the step's process sees it, relative to its working directory.
        overwrite: In mode ``upload``: whether files of the same names there are replaced; else they are an
            error. Where it is the destination of a transfer: whether files there that the source lacks are
            deleted. A step's own directories are always new.
        pin: How a run finds out what the data are: by ``content``, or, quicker, by the ``version`` that
            the store tells (etag, generation, or modification time with size).

    Raises:
        DefinitionError: The name is no name, or a mode is unknown.
    """

    def __init__(
        self,
        datastore: Datastore,
        data_reference_name: str | None = None,
        path_on_datastore: str | None = None,
        mode: ReferenceMode = "mount",
        path_on_compute: str | None = None,
        overwrite: bool = False,
        *,
        pin: Literal["content", "version"] = "content",
    ) -> None:
        self.name = _check_name("DataReference", data_reference_name or datastore.name)
        if mode not in ("mount", "download", "direct", "upload"):
            raise DefinitionError(
                f"DataReference {self.name!r}: mode is {mode!r}; it can be 'mount', 'download', 'direct' or "
                "'upload'"
            )
        if pin not in ("content", "version"):
            raise DefinitionError(
                f"DataReference {self.name!r}: pin is {pin!r}; it can be 'content' or 'version'"
            )
        self.datastore = datastore
        self.path_on_datastore = path_on_datastore or ""
        self.mode: ReferenceMode = mode
        self.path_on_compute = path_on_compute
        self.overwrite = overwrite
        self.pin: Literal["content", "version"] = pin

    @property
    def data_reference_name(self) -> str:
        """Its name, by Azure ML's word for it."""
        return self.name

    def path(
        self, path: str | None = None, data_reference_name: str | None = None
    ) -> DataReference:
        """Return a reference to something below this one."""
        joined = "/".join(part for part in (self.path_on_datastore.rstrip("/"), path) if part)
        return self._with(path_on_datastore=joined, name=data_reference_name)

    def as_download(
        self,
        path_on_compute: str | None = None,
        overwrite: bool = False,
    ) -> DataReference:
        """Return the same data as a copy of the step's own, which it may write to."""
        del overwrite
        return self._with(mode="download", path_on_compute=path_on_compute)

    def as_upload(
        self, path_on_compute: str | None = None, overwrite: bool = False
    ) -> DataReference:
        """Return the same place as one that a step's files are uploaded to, once it has succeeded."""
        return self._with(mode="upload", path_on_compute=path_on_compute, overwrite=overwrite)

    def as_mount(self) -> DataReference:
        """Return the same data in place, read-only."""
        return self._with(mode="mount")

    def as_direct(self) -> DataReference:
        """Return the same data as their address: the program gets the URI in place of a path."""
        return self._with(mode="direct")

    def pinned_by(self, pin: Literal["content", "version"]) -> DataReference:
        """Return the same data, which a run finds out about in this way."""
        return self._with(pin=pin)

    def _with(
        self,
        *,
        path_on_datastore: str | None = None,
        name: str | None = None,
        mode: ReferenceMode | None = None,
        path_on_compute: str | None = None,
        overwrite: bool | None = None,
        pin: Literal["content", "version"] | None = None,
    ) -> DataReference:
        return DataReference(
            self.datastore,
            name or self.name,
            self.path_on_datastore if path_on_datastore is None else path_on_datastore,
            mode or self.mode,
            path_on_compute or self.path_on_compute,
            self.overwrite if overwrite is None else overwrite,
            pin=pin or self.pin,
        )

    def __str__(self) -> str:
        return f"{TOKEN_PREFIX}{self.name}"

    def __repr__(self) -> str:
        return f"DataReference({self.name!r}, {self.datastore.name}/{self.path_on_datastore})"


class PipelineData:
    """Data that one step makes and others read.

    The step gets a path at which nothing is yet: it makes a directory itself, or writes a file there.
    Where it goes is decided when the pipeline runs.

    Args:
        name: Letters, digits and underscores.
        datastore: Where it goes; by default the pipeline's default datastore.
        output_name: The name of the output port, if it shall differ from ``name``.
        output_mode: ``mount`` or ``upload``, as in Azure ML; where data and step share a file system they
            are written in place either way.
        output_path_on_compute: Where the step's process writes it, relative to its working directory.
        output_overwrite: As in Azure ML; every run has a place of its own, so there is nothing to decide.
        data_type: A label for people.
        is_directory: Whether it is a directory; None takes what the step makes.
        pipeline_output_name: The name under which the run as a whole offers it.

    Raises:
        DefinitionError: A name is no name, or the mode is unknown.
    """

    def __init__(
        self,
        name: str,
        datastore: Datastore | None = None,
        output_name: str | None = None,
        output_mode: OutputMode = "mount",
        output_path_on_compute: str | None = None,
        output_overwrite: bool | None = None,
        data_type: str | None = None,
        is_directory: bool | None = None,
        pipeline_output_name: str | None = None,
    ) -> None:
        self.name = _check_name("PipelineData", name)
        self.output_name = _check_name("PipelineData output", output_name or name)
        if output_mode not in ("mount", "upload"):
            raise DefinitionError(
                f"PipelineData {name!r}: output_mode is {output_mode!r}; it can be 'mount' or 'upload'"
            )
        self.datastore = datastore
        self.output_mode: OutputMode = output_mode
        self.output_path_on_compute = output_path_on_compute
        self.output_overwrite = output_overwrite
        self.data_type = data_type
        self.is_directory = is_directory
        self.pipeline_output_name = pipeline_output_name
        self.producers: list[PipelineStep] = []

    def as_input(self, input_name: str) -> InputBinding:
        """Return it as an input of another name."""
        return InputBinding(self, input_name)

    def as_mount(self, input_name: str | None = None) -> InputBinding:
        """Return it as an input in place, read-only."""
        return InputBinding(self, input_name, "mount")

    def as_download(
        self,
        input_name: str | None = None,
        path_on_compute: str | None = None,
        overwrite: bool | None = None,
    ) -> InputBinding:
        """Return it as an input that is a copy of the step's own, which it may write to."""
        del overwrite
        return InputBinding(self, input_name, "download", path_on_compute)

    def as_direct(self, input_name: str | None = None) -> InputBinding:
        """Return it as an input of which the program gets the URI in place of a path."""
        return InputBinding(self, input_name, "direct")

    def get_env_variable_name(self) -> str:
        """Return the environment variable in which a step's process finds its path."""
        return f"{TOKEN_PREFIX[1:]}{self.name}"

    def __str__(self) -> str:
        return f"{TOKEN_PREFIX}{self.name}"

    def __repr__(self) -> str:
        return f"PipelineData({self.name!r})"


class InputBinding:
    """How one step reads the output of another: under which name, in place or as a copy."""

    def __init__(
        self,
        data: PipelineData,
        name: str | None = None,
        mode: Mode = "mount",
        path_on_compute: str | None = None,
    ) -> None:
        self.data = data
        self.name = _check_name("input", name or data.name)
        self.mode: Mode = mode
        self.path_on_compute = path_on_compute

    def __str__(self) -> str:
        return f"{TOKEN_PREFIX}{self.name}"

    def __repr__(self) -> str:
        return f"InputBinding({self.data!r}, {self.name!r}, {self.mode!r})"


Handle = DataReference | PipelineData | InputBinding
"""Anything that stands for data in a step's inputs, outputs or arguments."""


def is_upload(handle: Any) -> TypeGuard[DataReference]:
    """Whether a handle among a step's inputs is a place that its files are uploaded to."""
    return isinstance(handle, DataReference) and handle.mode == "upload"
