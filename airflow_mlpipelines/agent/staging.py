"""Before the step: its code and inputs fetched from their datastores into the pod's workspace."""

from __future__ import annotations

import shutil
import tarfile
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from airflow_mlpipelines._units import show_duration, show_size
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.placing import place_link
from airflow_mlpipelines.storage.snapshots import unpack_snapshot
from airflow_mlpipelines.storage.transfer import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from airflow_mlpipelines.agent.job import Job
    from airflow_mlpipelines.storage.stores import StoreSet

    Say = Callable[[str], None]

CONTROL = "control"
KEPT_DIRECTORIES = ("outputs", "logs")
_STAGED = "staged"
_MERGING = "merging"
_CONTACT = "contact"
_CONTACT_SECONDS = 6 * 3600.0
_PAUSE = 0.05
_PROGRESS_SECONDS = 30.0


def stage(
    job: Job, workspace: Path, *, say: Say, private: Path, packed: Path | None = None
) -> None:
    """Fetch what the job names, wait for what the worker sends, and put the one to the other.

    What is fetched lies apart until all of it is there: the worker may send its part twice.

    Args:
        job: What to fetch.
        workspace: The directory that the pod's containers share.
        say: Takes a line for the step's log.
        private: A directory in the workspace for what is in the making.
        packed: The worker's part as a tar.gz; None waits until it is sent.

    Raises:
        DataError: Something can't be had, or the worker never came.
    """
    (workspace / CONTROL).mkdir(parents=True, exist_ok=True)
    (workspace / CONTROL / _CONTACT).touch()
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir(parents=True)
    stores = job.open_stores()
    try:
        _fetch_inputs(job, stores, private, say)
        _fetch_code(job, stores, private)
        if packed is None:
            _await_worker(workspace / CONTROL)
        else:
            _unpack(packed, workspace)
        _put_in_place(job, workspace, private)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _fetch_inputs(job: Job, stores: StoreSet, private: Path, say: Say) -> None:
    blobs = BlobCache(private / "blobs")
    for name, item in job.inputs.items():
        artifact = item.artifact
        what = f"{show_size(artifact.size)} in {artifact.files} file(s)"
        say(f"Fetching input {name!r}: {what} from {artifact.uri}")
        began = time.monotonic()
        try:
            with _telling(say, f"Input {name!r}", private, artifact.size):
                # As links: what the cache has is thrown away, and the step mounts its inputs read-only.
                target = private / "inputs" / item.target
                fetch(artifact, stores, blobs=blobs, target=target, link=True)
        except DataError as error:
            raise error.at(f"step {job.step!r}, input {name!r}") from error
        say(f"Input {name!r} is there after {show_duration(time.monotonic() - began)}")


def _fetch_code(job: Job, stores: StoreSet, private: Path) -> None:
    if job.snapshot is None:
        return
    datastore, digest = job.snapshot
    try:
        unpack_snapshot(digest, stores[datastore], private / "code")
    except DataError as error:
        raise error.at(f"step {job.step!r}: its code can't be fetched") from error
    for name in KEPT_DIRECTORIES:
        (private / "code" / name).mkdir(exist_ok=True)
    for name, (link, target) in job.links.items():
        try:
            place_link(private / "code", link, target)
        except DataError as error:
            raise error.at(f"step {job.step!r}, input {name!r}") from error


def _await_worker(control: Path) -> None:
    while not _claim(control):
        silent = time.time() - (control / _CONTACT).stat().st_mtime
        if silent > _CONTACT_SECONDS:
            raise DataError(f"no worker has asked for this pod in {show_duration(silent)}")
        time.sleep(_PAUSE)


def _claim(control: Path) -> bool:
    """Return whether the worker's part is there; from then on no worker can send it again."""
    try:
        (control / _STAGED).rename(control / _MERGING)
    except FileNotFoundError:
        return False
    return True


def _unpack(packed: Path, workspace: Path) -> None:
    try:
        with tarfile.open(packed, "r:gz") as archive:
            for name in {PurePosixPath(member.name).parts[0] for member in archive}:
                shutil.rmtree(workspace / name, ignore_errors=True)  # of a container before
            # Releases of Python before 3.11.4 know no filter; what the worker itself has packed leads nowhere else.
            archive.extraction_filter = getattr(tarfile, "tar_filter", None)
            archive.extractall(workspace)  # noqa: S202
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"the step's own files, {packed}, can't be unpacked: {error}") from error


def _put_in_place(job: Job, workspace: Path, private: Path) -> None:
    if job.snapshot is not None:
        shutil.rmtree(workspace / "code", ignore_errors=True)
        (private / "code").rename(workspace / "code")
    for item in job.inputs.values():
        target = workspace / "inputs" / item.target
        target.parent.mkdir(parents=True, exist_ok=True)
        (private / "inputs" / item.target).rename(target)


@contextmanager
def _telling(say: Say, what: str, directory: Path, size: int) -> Iterator[None]:
    """Say now and then how much has arrived."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(_PROGRESS_SECONDS):
            say(f"{what}: {show_size(_count_bytes(directory))} of {show_size(size)}")

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _count_bytes(directory: Path) -> int:
    """Return the bytes that have arrived, but are not known to be right yet."""
    total = 0
    with suppress(OSError):  # they may be moved away under our hands
        for file in (directory / "blobs" / "incoming").rglob("*"):
            total += file.lstat().st_size if file.is_file() else 0
    return total
