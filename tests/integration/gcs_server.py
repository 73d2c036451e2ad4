"""gcp-storage-emulator, a server that answers as Google Cloud Storage does, run for a test."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_SECONDS = 60.0


@contextmanager
def run_gcs(directory: Path, bucket: str) -> Iterator[dict[str, Any]]:
    """Serve an empty bucket, and give the arguments with which its driver reaches it.

    Args:
        directory: Where the server logs; its objects are in its memory.
        bucket: The bucket's name.
    """
    program = shutil.which("gcp-storage-emulator", path=str(Path(sys.executable).parent))
    if program is None:
        missing("no gcp-storage-emulator: pip install it")
        raise AssertionError
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *words, "--default-bucket", bucket],
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(process, port)
        yield {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}", "project": "test"}
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("gcp-storage-emulator did not start")
