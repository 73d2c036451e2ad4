"""Which data of a step its compute carries by itself, and which the worker fetches and commits for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.base import Carriage, CarriedOutput
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.kept import RUN_FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlpipelines.definition.graph import StepSpec
    from airflow_mlpipelines.execution.staging import Workplace
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.stores import Store, StoreSet


def leave_to_compute(
    workplace: Workplace,
    step: StepSpec,
    stores: StoreSet,
    *,
    snapshot: str | None,
    inputs: Mapping[str, Artifact | None],
    can_carry: Callable[[Store], bool],
) -> Workplace:
    """Return the workplace with all that the compute can carry by itself in its carriage.

    What is uploaded to places of others is left to the worker. It is the same for every try of a step run: nothing that is asked here depends on the worker.

    Args:
        workplace: Where the rest will be.
        step: The step.
        stores: The registered datastores.
        snapshot: The digest of the step's code; None for a step without files of its own.
        inputs: What each input has to hold; None for external data that is not there.
        can_carry: Whether the compute moves the data of a datastore.

    Raises:
        DataError: An input lies in no registered datastore.
    """
    carried: dict[str, tuple[Store, Artifact]] = {}
    targets: dict[str, str] = {}
    for item in step.inputs:
        artifact = inputs[item.name]
        if artifact is None or item.mode == "direct":
            continue
        try:
            store, path = stores.locate(artifact.uri)
        except DataError as error:
            raise DataError(f"step {step.name!r}, input {item.name!r}: {error}") from error
        if can_carry(store):
            carried[item.name] = (store, artifact)
            # A file keeps its name: programs go by suffixes such as .csv.gz.
            own = PurePosixPath(path).name if artifact.kind != "dir" else ""
            targets[item.name] = str(PurePosixPath(item.name, own))
    outputs = {
        output.name: CarriedOutput(
            store=stores[output.datastore],
            path=f"{workplace.directory}/{output.name}",
            is_directory=output.is_directory,
        )
        for output in step.outputs
        if output.upload is None and can_carry(stores[output.datastore])
    }
    default = stores.default
    code, kept = None, None
    if can_carry(default):
        code = (default, snapshot) if snapshot is not None else None
        kept = (default, f"{workplace.directory}/{RUN_FILES}")
    links = {
        item.name: item.path_on_compute
        for item in step.inputs
        if code is not None and item.path_on_compute is not None
    }
    links |= {
        output.name: output.upload.path_on_compute
        for output in step.outputs
        if code is not None and output.upload is not None and output.upload.path_on_compute
    }
    carriage = Carriage(snapshot=code, inputs=carried, links=links, outputs=outputs, kept=kept)
    return replace(workplace, carriage=carriage, stage=replace(workplace.stage, carried=targets))
