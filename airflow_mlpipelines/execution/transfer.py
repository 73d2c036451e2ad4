"""Carrying out a step that moves data: looked up, leased and remembered like any other, but no program."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.execution.step import StepRunner
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.copying import Transfer
from airflow_mlpipelines.storage.ends import open_end
from airflow_mlpipelines.storage.journal import Journal
from airflow_mlpipelines.storage.transfer import pin_external

if TYPE_CHECKING:
    from contextlib import ExitStack

    from airflow_mlpipelines.caching.fingerprint import Fingerprint
    from airflow_mlpipelines.storage.ends import End

_TYPES = {"dir": "directory", "file": "file", "object": "file"}


class TransferRunner(StepRunner):
    """Carries out one ``DataTransferStep``. One instance serves one try."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stop = threading.Event()

    def kill(self) -> None:
        """Stop at the next piece of data; what has arrived whole stays, for the next try."""
        self._stop.set()

    def _make_outputs(
        self, fingerprint: Fingerprint | None, held: ExitStack
    ) -> tuple[dict[str, Artifact], dict[str, Any]]:
        """Move the data; return what has arrived, and no metrics."""
        del fingerprint, held
        step, stores = self._step, self._services.stores
        output = step.outputs[0]
        artifact = self._find_source()
        source = open_end(*stores.locate(artifact.uri))
        target = self._find_target(artifact, source)
        journal = Journal(stores.default, source.uri, target.uri)
        fixed = "destination_path" in step.config
        transfer = Transfer(
            artifact,
            source,
            target,
            journal,
            blobs=self._services.blobs,
            emit=self._services.emit,
            stop=self._stop,
            replace=not fixed or bool(step.config["overwrite"]),
        )
        try:
            arrived = transfer.run()
        except DataError as error:
            raise error.at(
                f"step {step.name!r}: the transfer from datastore {source.store.name!r} ({source.uri}) to "
                f"datastore {target.store.name!r} ({target.uri}) failed"
            ) from error
        made = Artifact(
            target.uri,
            arrived.digest,
            arrived.size,
            arrived.files,
            arrived.kind,
            step_run=self._identity.step_run_id,
        )
        if fixed:  # others may write there: then the copy is made again
            now = pin_external(target.store, target.path, how="version")
            made = replace(made, version=now.digest if now is not None else None)
        else:
            journal.forget()
        return {output.name: made}, {}

    def _find_source(self) -> Artifact:
        step = self._step
        item = step.inputs[0]
        artifact = self._inputs[item.name]
        if artifact is None:
            place = item.source.model_dump()
            raise DataError(
                f"step {step.name!r}: there is nothing at {place.get('path')!r} of datastore "
                f"{place.get('datastore')!r} to transfer to datastore {step.outputs[0].datastore!r}.",
                retryable=False,
            )
        wanted = step.config["source_reference_type"]
        if wanted is not None and wanted != _TYPES[artifact.kind]:
            raise DataError(
                f"step {step.name!r}: {artifact.uri} is a {_TYPES[artifact.kind]}, but "
                f"source_reference_type is {wanted!r}.",
                retryable=False,
            )
        return artifact

    def _find_target(self, artifact: Artifact, source: End) -> End:
        """Return where the data go: a file that goes to a directory keeps its name in it."""
        step, output = self._step, self._step.outputs[0]
        store = self._services.stores[output.datastore]
        path = step.config.get("destination_path")
        base = f"{self._identity.directory(self._graph.name, step.id)}/{output.name}"
        target = open_end(store, base if path is None else str(path))
        wanted = step.config["destination_reference_type"]
        if artifact.kind == "dir":
            if wanted == "file":
                raise DataError(
                    f"step {step.name!r}: {artifact.uri} is a directory, but "
                    "destination_reference_type is 'file'.",
                    retryable=False,
                )
            return target
        if wanted is None and path is not None:
            wanted = _TYPES.get(target.list().kind or "file")
        if wanted != "directory":
            return target
        return open_end(store, target.below(PurePosixPath(source.path).name))
