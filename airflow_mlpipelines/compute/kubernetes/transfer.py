"""Carrying a step's files to its pod and back, as tar archives through the API server.

A connection may break anywhere, and the end of what a command prints may get lost. So an archive counts
only once both sides have found the same SHA-256 of it, and then appears as a whole.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.base import KEPT_DIRECTORIES
from airflow_mlpipelines.compute.kubernetes.agent import commit
from airflow_mlpipelines.compute.kubernetes.archive import (
    archive_size,
    make_entries,
    unpack,
    write_archive,
)
from airflow_mlpipelines.compute.kubernetes.channel import Channel, ChannelError, CommandError
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, STAGE
from airflow_mlpipelines.compute.kubernetes.reconnecting import Progress, see_through
from airflow_mlpipelines.compute.kubernetes.scripts import RECEIVE, SEND, SHELL
from airflow_mlpipelines.compute.kubernetes.volumes import SHARED_OUTPUTS
from airflow_mlpipelines.compute.kubernetes.watch import container_state

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from airflow_mlpipelines.compute.base import Emit, Stage, StepLaunch
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec

_BUFFER = 256 << 10
_NOTHING = "nothing"


def deliver(cluster: Cluster, spec: PodSpec, stage: Stage) -> None:
    """Send the step's directories to its waiting pod, also if a connection breaks on the way.

    Raises:
        ClusterError: That fails time and again, or the pod is gone.
        ClusterLostError: The API server does not answer, or nothing gets through to the pod.
    """
    progress = Progress()

    def is_over(pod: Mapping[str, Any] | None) -> bool:
        return pod is not None and container_state(pod, STAGE)[0] == "terminated"

    def send() -> None:
        send_stage(cluster, spec, stage, note=lambda sent: progress.note("stage", sent))

    see_through(cluster, spec.name, STAGE, send, progress, is_over)


def collect(
    cluster: Cluster, spec: PodSpec, launch: StepLaunch, *, emit: Emit, with_outputs: bool
) -> None:
    """Bring what the step has made to the worker, also if a connection breaks on the way.

    What the launch's carriage holds is committed by the pod's agent instead, and noted there.

    Args:
        cluster: The cluster.
        spec: The pod.
        launch: The step run.
        emit: Takes the agent's lines.
        with_outputs: Whether the step succeeded; else only the files of its run are of interest.

    Raises:
        CommandError: They can't be had: the pod does not give them, or has ended, or is gone.
        ClusterError: The API server refuses.
        ClusterLostError: It does not answer, or nothing gets through to the pod, which is as it was.
        StoreError: The agent can't send an output.
        DataError: An output was not made, or is of the wrong kind.
    """
    stage, carriage, pod = launch.stage, launch.carriage, spec.name
    progress = Progress()

    def fetch() -> None:
        if carriage.outputs or carriage.kept:
            progress.once("commit", have_committed)
        if with_outputs and SHARED_OUTPUTS not in spec.shared:
            progress.once("outputs", bring_outputs)
        progress.once("run", bring_run_files)

    def have_committed() -> None:
        # It goes on where it is while connections come and go.
        commit(cluster, pod, launch, emit=emit, with_outputs=with_outputs, heard=progress.touch)

    def bring_outputs() -> None:
        note = partial(progress.note, "outputs")
        fetch_outputs(cluster, pod, stage, without=carriage.outputs, note=note)

    def bring_run_files() -> None:
        note = partial(progress.note, "run")
        fetch_run_files(cluster, pod, stage, with_kept=carriage.kept is None, note=note)

    see_through(cluster, pod, OUTPUTS_KEEPER, fetch, progress, lambda _pod: False)


def send_stage(
    cluster: Cluster, spec: PodSpec, stage: Stage, *, note: Callable[[int], None] = lambda _: None
) -> int:
    """Send the step's directories to its waiting pod, let the step begin, and return the bytes sent.

    ``note`` is told again and again how many they are so far.

    Raises:
        ChannelError: The connection broke; the step has not begun, or the pod says so.
    """
    word = secrets.token_hex(8)
    entries = make_entries(stage, spec)
    size = archive_size(entries)
    sender = _Sender()
    with Channel(
        cluster, spec.name, STAGE, [SHELL, "-c", RECEIVE, SHELL, str(size), word]
    ) as channel:
        for chunk in write_archive(entries):
            sender.digest.update(chunk)
            sender.sent += len(chunk)
            channel.write(chunk)
            note(sender.sent)
        if sender.sent != size:
            raise CommandError(f"{sender.sent} bytes were sent instead of {size}")
        said = b""
        answered = False
        for data in channel.read():
            said += data
            if not answered and b"\n" in said:
                if said.decode().strip() != sender.digest.hexdigest():
                    raise ChannelError("the pod received something else than was sent")
                channel.write(f"{word}\n".encode())
                answered = True
    return size


def fetch_outputs(
    cluster: Cluster,
    pod: str,
    stage: Stage,
    *,
    without: Collection[str] = (),
    note: Callable[[int], None] = lambda _: None,
) -> int:
    """Bring the step's outputs, but those ``without``, to where the worker expects them; return the bytes received.

    ``note`` is told again and again how many they are so far.

    Raises:
        ChannelError: The connection broke; nothing has appeared.
    """
    names = [
        path.relative_to(stage.outputs_root).as_posix()
        for name, path in stage.outputs.items()
        if name not in without
    ]
    if not names:
        return 0
    with _receiving(stage.outputs_root) as incoming:
        wanted = names if without else ["."]
        received = _fetch(cluster, pod, "outputs", wanted, incoming, note)
        _move_entries(incoming, stage.outputs_root)
    return received


def fetch_run_files(
    cluster: Cluster,
    pod: str,
    stage: Stage,
    *,
    with_kept: bool = True,
    note: Callable[[int], None] = lambda _: None,
) -> int:
    """Bring the run directory, and ``./outputs`` and ``./logs``, to the worker; return the bytes received.

    ``note`` is told again and again how many they are so far.

    Raises:
        ChannelError: The connection broke; nothing has appeared.
    """
    names = ["run"]
    if with_kept:
        names += [f"code/{name}" for name in KEPT_DIRECTORIES]
    with _receiving(stage.root) as incoming:
        received = _fetch(cluster, pod, ".", names, incoming, note)
        for name in KEPT_DIRECTORIES:
            if (incoming / "code" / name).exists():
                _replace(incoming / "code" / name, stage.code / name)
        if (incoming / "run").is_dir():
            _move_entries(incoming / "run", stage.run)
    return received


class _Sender:
    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.sent = 0


class _Incoming:
    """What a command prints, as a file to read an archive from, digested on its way."""

    def __init__(self, chunks: Iterator[bytes], note: Callable[[int], None]) -> None:
        self._chunks = chunks
        self._note = note
        self._buffer = b""
        self.digest = hashlib.sha256()
        self.received = 0

    def read(self, amount: int) -> bytes:
        while len(self._buffer) < amount:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self.digest.update(chunk)
            self.received += len(chunk)
            self._note(self.received)
            self._buffer += chunk
        data, self._buffer = self._buffer[:amount], self._buffer[amount:]
        return data

    def drain(self) -> None:
        while self.read(_BUFFER):
            pass


def _fetch(
    cluster: Cluster,
    pod: str,
    directory: str,
    names: Iterable[str],
    target: Path,
    note: Callable[[int], None],
) -> int:
    word = secrets.token_hex(8)
    command = [SHELL, "-c", SEND, SHELL, word, directory, *names]
    with Channel(cluster, pod, OUTPUTS_KEEPER, command) as channel:
        incoming = _Incoming(channel.read(), note)
        try:
            with tarfile.open(
                fileobj=incoming,  # type: ignore[call-overload]
                mode="r|",
                bufsize=_BUFFER,
            ) as archive:
                unpack(archive, target)
        except tarfile.ReadError as error:
            incoming.drain()  # raises where it was the connection that broke
            if channel.said != _NOTHING:
                raise ChannelError(f"no whole archive has arrived: {error}") from error
            return 0
        incoming.drain()
        if channel.said.splitlines()[-1:] != [incoming.digest.hexdigest()]:
            raise ChannelError(f"something else has arrived than the pod has sent. {channel.said}")
    return incoming.received


class _receiving:  # noqa: N801 - used as a function
    """A new directory on the disk of ``beside``, gone at the end."""

    def __init__(self, beside: Path) -> None:
        self._beside = beside

    def __enter__(self) -> Path:
        self._beside.mkdir(parents=True, exist_ok=True)
        self._path = Path(tempfile.mkdtemp(prefix=".incoming-", dir=self._beside))
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def _move_entries(source: Path, target: Path) -> None:
    for entry in source.iterdir():
        _replace(entry, target / entry.name)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    source.replace(target)
