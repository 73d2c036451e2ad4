"""What a step writes into its run directory, seen by the worker while the step runs: metrics above all."""

from __future__ import annotations

import hashlib
import io
import secrets
import shutil
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.kubernetes.archive import unpack
from airflow_mlpipelines.compute.kubernetes.channel import Channel, ChannelError
from airflow_mlpipelines.compute.kubernetes.pod import OUTPUTS_KEEPER
from airflow_mlpipelines.compute.kubernetes.scripts import RELAY, SHELL

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import Stage
    from airflow_mlpipelines.compute.kubernetes.cluster import Cluster

INTERVAL_SECONDS = 2
LARGEST = 8 << 20
"""Bytes; a run directory with more in it arrives at the step's end."""
_PAUSE_AFTER_BREAK = 5.0


class RunFileRelay:
    """Brings what changes in a pod's run directory, every two seconds, over one lasting connection.

    It is a convenience, and lets nothing fail: at the end, everything is fetched anyway.
    """

    def __init__(self, cluster: Cluster, pod: str, stage: Stage) -> None:
        self._cluster = cluster
        self._pod = pod
        self._stage = stage
        self._over = threading.Event()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> RunFileRelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._busy:  # whoever fetches the files now must not meet older ones
            self._over.set()

    def _run(self) -> None:
        self._over.wait(INTERVAL_SECONDS)  # a step that ends sooner pays for no connection
        while not self._over.is_set():
            try:
                self._relay()
            except (ChannelError, OSError):
                self._over.wait(_PAUSE_AFTER_BREAK)

    def _relay(self) -> None:
        command = [
            SHELL,
            "-c",
            RELAY,
            SHELL,
            secrets.token_hex(8),
            str(INTERVAL_SECONDS),
            str(LARGEST),
        ]
        with Channel(self._cluster, self._pod, OUTPUTS_KEEPER, command) as channel:
            received = b""
            for data in channel.read():
                received += data
                if self._over.is_set():
                    return
                while b"\n" in received:
                    line, _, rest = received.partition(b"\n")
                    size_text, _, digest = line.decode().partition(" ")
                    size = int(size_text)
                    if len(rest) < size:
                        break
                    archive, received = rest[:size], rest[size:]
                    if size and hashlib.sha256(archive).hexdigest() == digest:
                        self._take(archive)

    def _take(self, archive: bytes) -> None:
        incoming = Path(tempfile.mkdtemp(prefix=".relayed-", dir=self._stage.root))
        try:
            with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
                unpack(opened, incoming)
            with self._busy:
                for file in (incoming / "run").iterdir():
                    target = self._stage.run / file.name
                    if not self._over.is_set() and file.is_file() and not file.is_symlink():
                        file.replace(target)
        except tarfile.TarError:
            return  # a file was cut short under tar's hands
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
