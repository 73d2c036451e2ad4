"""Steps that run no program: they move data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow_mlpipelines.definition.computes import LocalCompute
from airflow_mlpipelines.definition.data import (
    DataReference,
    InputBinding,
    PipelineData,
    is_upload,
)
from airflow_mlpipelines.definition.steps import PipelineStep
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlpipelines.definition.computes import ComputeTarget

TRANSFER_OPERATOR = "airflow_mlpipelines.operators.steps:DataTransferOperator"
TRANSFER_COMPUTE = "data-transfer"
"""The compute of a transfer that names none: the Airflow worker."""
ReferenceType = Literal["file", "directory"]


class DataTransferStep(PipelineStep):
    """Copies a file or a directory from one datastore to another, on the Airflow worker.

    A store that holds both copies by itself. What arrived in an earlier try, or in an earlier run with
    the same two places, is not sent again.

    Args:
        name: Its name.
        source_data_reference: What to copy: data that is there before, or that another step makes.
        destination_data_reference: Where to: a :class:`DataReference` is that very place, whose files of
            the same names are replaced; a :class:`PipelineData` is a new place of this run.
        compute_target: A compute of type local; by default the Airflow worker.
        source_reference_type: ``file`` or ``directory``; the step fails if the source is the other.
        destination_reference_type: ``file`` or ``directory``. A file that goes to a directory keeps its
            name there. By default it is what is there, else what the source is.
        allow_reuse: Whether to do nothing where the same was copied before and is still there.
        pin: How a run finds out what a source on a remote store is. ``version`` believes what the store
            tells; ``content`` reads it before.
        options: As :class:`PipelineStep` takes them: ``version``, ``retries``, ``retry_delay``,
            ``description``.

    Raises:
        DefinitionError: A reference is missing or of the wrong type.
    """

    operator = TRANSFER_OPERATOR

    def __init__(
        self,
        name: str,
        source_data_reference: DataReference | PipelineData | InputBinding | None = None,
        destination_data_reference: DataReference | PipelineData | None = None,
        compute_target: ComputeTarget | str | tuple[str, str] | None = None,
        source_reference_type: ReferenceType | None = None,
        destination_reference_type: ReferenceType | None = None,
        allow_reuse: bool = True,
        *,
        pin: Literal["content", "version"] = "version",
        **options: Any,
    ) -> None:
        source, destination = source_data_reference, destination_data_reference
        if not isinstance(source, (DataReference, PipelineData, InputBinding)):
            raise DefinitionError(
                f"DataTransferStep {name!r}: source_data_reference is {_show(source)}; it has to be a "
                "DataReference or a PipelineData"
            )
        if is_upload(source):
            raise DefinitionError(
                f"DataTransferStep {name!r}: source_data_reference {source.name!r} is in mode 'upload', a place "
                "that files go to. Drop the mode."
            )
        if not isinstance(destination, (DataReference, PipelineData)):
            raise DefinitionError(
                f"DataTransferStep {name!r}: destination_data_reference is {_show(destination)}; it has to "
                "be a DataReference or a PipelineData"
            )
        for what, kind in (
            ("source_reference_type", source_reference_type),
            ("destination_reference_type", destination_reference_type),
        ):
            if kind not in (None, "file", "directory"):
                raise DefinitionError(
                    f"DataTransferStep {name!r}: {what} is {kind!r}; it can be 'file' or 'directory'"
                )
        if (source_reference_type, destination_reference_type) == ("directory", "file"):
            raise DefinitionError(
                f"DataTransferStep {name!r}: a directory can't be copied to a file. Correct "
                "source_reference_type or destination_reference_type"
            )
        config: dict[str, Any] = {
            "source_reference_type": source_reference_type,
            "destination_reference_type": destination_reference_type,
        }
        if isinstance(destination, DataReference):
            _check_apart(name, source, destination)
            config["destination_path"] = destination.path_on_datastore
            config["overwrite"] = destination.overwrite
            self._output = PipelineData(destination.name, datastore=destination.datastore)
        else:
            self._output = destination
        if isinstance(source, DataReference) and not source.datastore.spec.url.startswith("file:"):
            source = source.pinned_by(pin)
        super().__init__(
            name,
            inputs=[source],
            outputs=[self._output],
            compute_target=LocalCompute(TRANSFER_COMPUTE)
            if compute_target is None
            else compute_target,
            allow_reuse=allow_reuse,
            config=config,
            **options,
        )

    def get_output(self) -> PipelineData:
        """Return what arrives, as data for the steps after this one."""
        return self._output

    def make_command(self) -> Sequence[Any]:
        """Return nothing: no program runs."""
        return ()


def _check_apart(name: str, source: Any, destination: DataReference) -> None:
    """Raise if a reference would be copied to itself, into itself, or over what it lies in."""
    if not isinstance(source, DataReference) or source.datastore.name != destination.datastore.name:
        return
    places = [f"{it.path_on_datastore.strip('/')}/".lstrip("/") for it in (source, destination)]
    if places[0].startswith(places[1]) or places[1].startswith(places[0]):
        raise DefinitionError(
            f"DataTransferStep {name!r}: source {source!r} and destination {destination!r} lie one in the "
            "other. Choose another destination"
        )


def _show(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
