"""versitygw, a real S3 server whose objects are files: found on this machine, and run for a test or a benchmark."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

S3_KEYS = ("mlpipelines", "mlpipelines-secret")
_VERSION = "1.8.0"


def find_versitygw() -> Path | None:
    """Return the program, as ``.ci/versitygw.sh`` leaves it or as it is on the PATH."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = caches / "mlpipelines-tests" / f"versitygw-{_VERSION}" / "versitygw"
    found = str(built) if built.exists() else shutil.which("versitygw")
    return Path(found) if found else None


@contextmanager
def run_versitygw(
    program: Path,
    directory: Path,
    *,
    certificate: tuple[Path, Path] | None = None,
    region: str = "us-east-1",
    access_log: Path | None = None,
    versions: Path | None = None,
) -> Iterator[str]:
    """Serve a directory, whose folders are buckets, and give the server's address.

    Args:
        program: As :func:`find_versitygw` found it.
        directory: What to serve.
        certificate: A certificate for 127.0.0.1 and its key, for HTTPS.
        region: That of the buckets.
        access_log: Where it logs what it is asked.
        versions: Where it keeps older versions of objects, in buckets that say so.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    keys = {"ROOT_ACCESS_KEY": S3_KEYS[0], "ROOT_SECRET_KEY": S3_KEYS[1]}
    words: list[str | Path] = [
        program,
        "--quiet",
        "--port",
        f"127.0.0.1:{port}",
        "--region",
        region,
    ]
    words += ["--cert", certificate[0], "--key", certificate[1]] if certificate is not None else []
    words += ["--access-log", access_log] if access_log is not None else []
    words += ["posix", *(["--versioning-dir", versions] if versions is not None else [])]
    process = subprocess.Popen(
        [*words, directory],
        env={**os.environ, **keys},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)
