"""The directories of a step run on the worker: code unpacked, inputs at hand, room for outputs."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from airflow_mlpipelines import settings
from airflow_mlpipelines.compute.base import KEPT_DIRECTORIES, Carriage, Stage
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.runtime.stage import stage_runtime
from airflow_mlpipelines.storage.kept import RUN_FILES, keep_files
from airflow_mlpipelines.storage.placing import check_inside, make_writable, place_link
from airflow_mlpipelines.storage.snapshots import unpack_snapshot
from airflow_mlpipelines.storage.transfer import commit_output, fetch
from airflow_mlpipelines.storage.upload_notes import UploadNote
from airflow_mlpipelines.storage.uploads import check_upload, upload_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import ExitStack
    from pathlib import Path

    from airflow_mlpipelines.compute.base import ProcessPaths
    from airflow_mlpipelines.definition.graph import OutputSpec, StepSpec
    from airflow_mlpipelines.execution.finished import FinishedProgram
    from airflow_mlpipelines.execution.identity import TaskIdentity
    from airflow_mlpipelines.storage.artifact import Artifact
    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.stat_cache import StatCache
    from airflow_mlpipelines.storage.stores import StoreSet


@dataclass(frozen=True)
class FetchedData:
    """How a step gets data that come from remote datastores.

    Attributes:
        blobs: What this machine has fetched before.
        held: Keeps what the step uses in there until it is closed.
        link: Whether the step's inputs are mounted read-only, so that hard links are safe from it.
    """

    blobs: BlobCache
    held: ExitStack
    link: bool = False


@dataclass(frozen=True)
class Workplace:
    """Where one step run does its work, and how to take it down again.

    Attributes:
        directory: Where on their datastores the outputs go.
        in_place: Whether the outputs are written where they stay, so that committing copies nothing.
        carriage: What the compute carries by itself: it never comes here.
    """

    stage: Stage
    directory: str
    in_place: bool
    carriage: Carriage = field(default_factory=Carriage)

    def remove(self) -> None:
        """Take down everything but the outputs that stay."""
        shutil.rmtree(self.stage.root, ignore_errors=True)


def locate_workplace(
    step: StepSpec, stores: StoreSet, *, step_run_id: str, directory: str
) -> Workplace:
    """Return where the step run will work; nothing is made yet.

    Outputs are written in place if they all go to one file store, else they are committed from the
    worker's disk; what is uploaded to places of others is not looked at for that.
    """
    root = settings.work_directory() / step_run_id
    targets = {output.datastore for output in step.outputs if output.upload is None}
    store = stores[targets.pop()] if len(targets) == 1 else None
    in_place = store is not None and store.is_local
    outputs_root = (
        store.local_path(directory) if store is not None and store.is_local else root / "outputs"
    )
    stage = Stage(
        root=root,
        code=root / "code",
        runtime=settings.runtime_directory(),
        run=root / "run",
        inputs={},
        outputs={output.name: outputs_root / output.name for output in step.outputs},
        outputs_root=outputs_root,
    )
    return Workplace(stage, directory, in_place)


def fill_stage(
    workplace: Workplace,
    step: StepSpec,
    stores: StoreSet,
    *,
    snapshot: str | None,
    inputs: Mapping[str, Artifact | None],
    fetched: FetchedData | None,
    adopt: bool,
) -> Workplace:
    """Return the workplace with code, runtime and inputs there, but those of mode ``direct``.

    What the workplace's carriage holds is left to the compute.

    External data that is not there is no error by itself (Azure ML's rule): the step gets a path at
    which nothing is.

    Args:
        workplace: As :func:`locate_workplace` returned it.
        step: The step.
        stores: The registered datastores.
        snapshot: The digest of the step's code; None for a step without files of its own.
        inputs: What each input has to hold; None for external data that is not there.
        fetched: How remote data are fetched; None where the program has its inputs with it.
        adopt: A program of an earlier try still works there: its directories are left as they are.

    Raises:
        DataError: An input or the snapshot can't be had.
    """
    stage, carriage = workplace.stage, workplace.carriage
    if not adopt:
        _make_anew(stage, stores, snapshot=snapshot if carriage.snapshot is None else None)
        for output in step.outputs:
            if output.upload is not None:
                stage.outputs[output.name].mkdir()
    paths = {}
    for item in step.inputs:
        artifact = inputs[item.name]
        if artifact is None or item.mode == "direct" or item.name in carriage.inputs:
            continue
        target = stage.root / "inputs" / item.name
        if fetched is None:
            paths[item.name] = target
            continue
        try:
            found = fetch(
                artifact,
                stores,
                blobs=fetched.blobs,
                target=target,
                link=fetched.link and item.mode != "download",
                held=fetched.held,
            )
        except DataError as error:
            raise error.at(f"step {step.name!r}, input {item.name!r}") from error
        if item.mode == "download" and not adopt:
            found = _own(found, target)
        paths[item.name] = found
    filled = replace(stage, inputs=paths, runtime=stage_runtime(stage.runtime))
    return replace(workplace, stage=filled)


def _make_anew(stage: Stage, stores: StoreSet, *, snapshot: str | None) -> None:
    for directory in (stage.root, stage.outputs_root):
        shutil.rmtree(directory, ignore_errors=True)
    stage.outputs_root.mkdir(parents=True)
    stage.run.mkdir(parents=True)
    if snapshot is not None:
        unpack_snapshot(snapshot, stores.default, stage.code)
    for kept in KEPT_DIRECTORIES:
        (stage.code / kept).mkdir(parents=True, exist_ok=True)


def link_data(workplace: Workplace, step: StepSpec, paths: ProcessPaths) -> None:
    """Let the step find inputs, and directories to upload, in its working directory, where ``path_on_compute`` says.

    Raises:
        DataError: A file of the step's own is there already.
    """
    if workplace.carriage.snapshot is not None:  # its links are made where its code is
        return
    wanted = [
        (f"input {item.name!r}", item.path_on_compute, paths.inputs.get(item.name))
        for item in step.inputs
    ]
    wanted += [
        (f"upload {item.name!r}", item.upload.path_on_compute, paths.outputs[item.name])
        for item in step.outputs
        if item.upload is not None
    ]
    for port, path_on_compute, target in wanted:
        if path_on_compute is None or target is None:
            continue
        try:
            place_link(workplace.stage.code, path_on_compute, target)
        except DataError as error:
            raise error.at(f"step {step.name!r}, {port}") from error


def _own(found: Path, target: Path) -> Path:
    """Return a private copy: a step that downloads its input may write to it."""
    if found != target:  # else it is a copy already, as the blob cache gives it
        target.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, target, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(found, target)
    make_writable(target)
    return target


def commit_outputs(
    workplace: Workplace,
    step: StepSpec,
    stores: StoreSet,
    *,
    identity: TaskIdentity,
    cache: StatCache | None,
    blobs: BlobCache,
    note: FinishedProgram | None,
) -> dict[str, Artifact]:
    """Return the step's outputs, digested and where they stay; those that the compute committed are among them.

    What goes to places of others comes last, and is not begun before all of it could go there.

    Args:
        workplace: What the program has made.
        step: The step.
        stores: The registered datastores.
        identity: The task instance that this is.
        cache: Digests of local files that were read before.
        blobs: Where what is sent is kept, for the steps that read it on this machine.
        note: Knows what an earlier try has sent, and is told what this one has.

    Raises:
        StoreError: An output can't be sent. It is still there to be sent by a later try.
        DataError: The program did not make an output, or made it of the wrong kind, or a place is taken.
    """
    carriage = workplace.carriage
    artifacts = {**carriage.committed, **(note.committed if note is not None else {})}
    for output in step.outputs:
        if output.upload is not None or output.name in artifacts:
            continue
        source = workplace.stage.outputs[output.name]
        try:
            artifacts[output.name] = commit_output(
                stores[output.datastore],
                f"{workplace.directory}/{output.name}",
                check_inside(source, workplace.stage.outputs_root),
                step_run=identity.step_run_id,
                expect_directory=output.is_directory,
                cache=cache,
                blobs=blobs,
            )
        except DataError as error:
            raise error.at(f"step {step.name!r}, output {output.name!r}") from error
        if note is not None:
            note.add(output.name, artifacts[output.name])
    artifacts.update(_upload_all(workplace, step, stores, identity))
    return artifacts


def _upload_all(
    workplace: Workplace, step: StepSpec, stores: StoreSet, identity: TaskIdentity
) -> dict[str, Artifact]:
    """Send files to places of others, and take them away from here once all are there."""
    places = [(output, place) for output in step.outputs if (place := output.upload) is not None]
    notes = {
        output.name: UploadNote(
            stores.default, identity.sender, stores[output.datastore].uri(place.path)
        )
        for output, place in places
    }
    sources = workplace.stage.outputs
    for output, _ in places:
        with _naming_upload(step, output):
            check_inside(sources[output.name], workplace.stage.outputs_root)
    if len(places) > 1:  # one alone is looked at when it is sent
        for output, place in places:
            with _naming_upload(step, output):
                store = stores[output.datastore]
                check_upload(
                    store,
                    place.path,
                    sources[output.name],
                    overwrite=place.overwrite,
                    note=notes[output.name],
                )
    sent = {}
    for output, place in places:
        source = sources[output.name]
        with _naming_upload(step, output):
            sent[output.name] = upload_files(
                stores[output.datastore],
                place.path,
                source,
                overwrite=place.overwrite,
                step_run=identity.step_run_id,
                note=notes[output.name],
            )
    for output, _ in places:  # not before all of it is everywhere: else all would be made again
        notes[output.name].forget()
        shutil.rmtree(sources[output.name], ignore_errors=True)
    return sent


@contextmanager
def _naming_upload(step: StepSpec, output: OutputSpec) -> Iterator[None]:
    """Let the errors inside name step and upload."""
    try:
        yield
    except DataError as error:
        raise error.at(f"step {step.name!r}, upload {output.name!r}") from error


def keep_run_files(workplace: Workplace, stores: StoreSet) -> list[str]:
    """Keep ``./outputs``, ``./logs`` and the metrics with the run; return what was kept, as URIs."""
    found = [workplace.stage.run / "metrics.jsonl"]
    if workplace.carriage.kept is None:
        found += [workplace.stage.code / name for name in KEPT_DIRECTORIES]
    return keep_files(stores.default, f"{workplace.directory}/{RUN_FILES}", found)
