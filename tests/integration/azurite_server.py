"""Azurite, Microsoft's emulator of Azure Storage: found on this machine, and run for a test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.parts import missing

# The account that every Azurite has, and its key, are public.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def find_azurite():
    """Return the program, as ``.ci/azurite.sh`` leaves it or as it is on the PATH."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlpipelines-tests"
    installed = sorted(caches.glob("azurite-*/node_modules/.bin/azurite-blob"))
    return str(installed[-1]) if installed else shutil.which("azurite-blob")


@contextmanager
def run_azurite(directory):
    """Keep blobs in a directory, and give the port; skip the test where it or adlfs is missing."""
    program = find_azurite()
    if program is None:
        missing(
            "no azurite-blob: .ci/azurite.sh installs it, or npm install azurite puts it on the PATH"
        )
    if find_spec("adlfs") is None:
        missing("no adlfs: pip install 'airflow-mlpipelines[azure]'")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [
        "--blobPort",
        str(port),
        "--location",
        str(directory),
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
    ]
    process = subprocess.Popen([program, *words], start_new_session=True)
    try:
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=20)


def connection_string(port, key=KEY, sas=None):
    """Return what an Airflow connection needs in its extra, with the account's key or a signature for access."""
    who = f"SharedAccessSignature={sas}" if sas else f"AccountName={ACCOUNT};AccountKey={key}"
    return f"DefaultEndpointsProtocol=http;BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};{who}"
