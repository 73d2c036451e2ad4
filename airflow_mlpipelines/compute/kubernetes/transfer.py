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
import time
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
from airflow_mlpipelines.compute.kubernetes.channel import Channel, ChannelError
from airflow_mlpipelines.compute.kubernetes.cluster import PATIENCE_SECONDS
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER, STAGE
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
_ATTEMPTS = 4


def deliver(cluster: Cluster, spec: PodSpec, stage: Stage) -> None:
    """Send the step's directories to its waiting pod, also if a connection breaks on the way.

    Raises:
        ClusterError: That fails time and again, or the pod is gone.
    """

    def is_over(pod: Mapping[str, Any] | None) -> bool:
        return pod is not None and container_state(pod, STAGE)[0] == "terminated"

    _try_again(cluster, spec.name, STAGE, lambda: send_stage(cluster, spec, stage), is_over)


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
        ClusterError: That fails time and again, or the pod is gone.
        DataError: The agent can't commit an output.
    """
    stage, carriage, pod = launch.stage, launch.carriage, spec.name

    def fetch() -> None:
        if carriage.outputs or carriage.kept:
            commit(cluster, pod, launch, emit=emit, with_outputs=with_outputs)
        if with_outputs and SHARED_OUTPUTS not in spec.shared:
            fetch_outputs(cluster, pod, stage, without=carriage.outputs)
        fetch_run_files(cluster, pod, stage, with_kept=carriage.kept is None)

    _try_again(cluster, pod, OUTPUTS_KEEPER, fetch, lambda _pod: False)


def _try_again(
    cluster: Cluster,
    name: str,
    container: str,
    action: Callable[[], object],
    is_done: Callable[[Mapping[str, Any] | None], bool],
) -> None:
    """Do ``action`` until it succeeds, as long as the container is there; an absent cluster is waited for."""
    attempts = 0
    while True:
        try:
            action()
        except ChannelError:
            pod, was_away = cluster.find_patiently("pods", name, patience=PATIENCE_SECONDS)
            if is_done(pod):
                return
            attempts += not was_away
            gone = pod is None or container_state(pod, container)[0] != "running"
            if gone or attempts >= _ATTEMPTS:
                raise
            time.sleep(attempts)
        else:
            return


def send_stage(cluster: Cluster, spec: PodSpec, stage: Stage) -> int:
    """Send the step's directories to its waiting pod, let the step begin, and return the bytes sent.

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
        if sender.sent != size:
            raise ChannelError(f"{sender.sent} bytes were sent instead of {size}")
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
    cluster: Cluster, pod: str, stage: Stage, *, without: Collection[str] = ()
) -> int:
    """Bring the step's outputs, but those ``without``, to where the worker expects them; return the bytes received.

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
        received = _fetch(cluster, pod, "outputs", names if without else ["."], incoming)
        _move_entries(incoming, stage.outputs_root)
    return received


def fetch_run_files(cluster: Cluster, pod: str, stage: Stage, *, with_kept: bool = True) -> int:
    """Bring the run directory, and ``./outputs`` and ``./logs``, to the worker; return the bytes received.

    Raises:
        ChannelError: The connection broke; nothing has appeared.
    """
    names = ["run"]
    if with_kept:
        names += [f"code/{name}" for name in KEPT_DIRECTORIES]
    with _receiving(stage.root) as incoming:
        received = _fetch(cluster, pod, ".", names, incoming)
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

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
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
            self._buffer += chunk
        data, self._buffer = self._buffer[:amount], self._buffer[amount:]
        return data

    def drain(self) -> None:
        while self.read(_BUFFER):
            pass


def _fetch(cluster: Cluster, pod: str, directory: str, names: Iterable[str], target: Path) -> int:
    word = secrets.token_hex(8)
    command = [SHELL, "-c", SEND, SHELL, word, directory, *names]
    with Channel(cluster, pod, OUTPUTS_KEEPER, command) as channel:
        incoming = _Incoming(channel.read())
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
