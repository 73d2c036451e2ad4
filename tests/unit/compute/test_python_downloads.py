"""Pythons that a worker lacks: told what to do, or downloaded by uv, here from a mirror that is made on the spot."""

from __future__ import annotations

import json
import subprocess
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.environments import prepare_python, resolve_python
from airflow_mlpipelines.compute.interpreter import python_version
from airflow_mlpipelines.definition.graph import EnvironmentSpec
from airflow_mlpipelines.exceptions import EnvironmentBuildError
from tests.parts import require_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WANTED = "3.13" if python_version().startswith("3.12.") else "3.12"
LEFT_OUT = {
    "test", "idlelib", "ensurepip", "site-packages", "tkinter", "lib2to3", "turtledemo", "unittest", "__pycache__",
}  # fmt: skip


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def python() -> Path:
    """The wanted Python, which this machine has after all."""
    return require_python(WANTED).resolve()


@pytest.fixture
def mirror(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a server serves to uv as the list of Pythons, on a machine that has none but the worker's own."""
    served = tmp_path / "mirror"
    served.mkdir()
    assert python  # found before nothing can be found any more
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    major, minor = WANTED.split(".")
    (served / "list.json").write_text(
        json.dumps(
            {
                f"cpython-{WANTED}.0-linux-x86_64-gnu": {
                    "name": "cpython", "arch": {"family": "x86_64", "variant": None}, "os": "linux", "libc": "gnu",
                    "major": int(major), "minor": int(minor), "patch": 0, "prerelease": "", "variant": None,
                    "url": f"{url}/python.tar.gz", "sha256": None, "build": "20260101",
                }
            }
        )
    )  # fmt: skip
    for name, value in {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "HOME": str(tmp_path),
        "PATH": "/nowhere",
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        "UV_PYTHON_INSTALL_DIR": str(tmp_path / "pythons"),
        "UV_PYTHON_DOWNLOADS_JSON_URL": f"{url}/list.json",
        "AIRFLOW__MLPIPELINES__PYTHON_DOWNLOADS": "True",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def pack(python: Path, archive: Path) -> None:
    """Make an archive of an installed Python, in the layout of those that uv downloads."""

    def leave_out(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if LEFT_OUT & set(entry.name.split("/")) else entry

    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(python, f"python/bin/python{WANTED}")
        library = python.parent.parent / "lib"
        tar.add(library / f"python{WANTED}", f"python/lib/python{WANTED}", filter=leave_out)
        for shared in library.glob("libpython*so*"):
            tar.add(shared, f"python/lib/{shared.name}")


def test_a_python_that_is_not_there_is_downloaded_where_that_is_allowed(
    mirror: Path, python: Path, tmp_path: Path
) -> None:
    pack(python, mirror / "python.tar.gz")
    environment = EnvironmentSpec(name="e", python_version=WANTED)
    resolved = resolve_python(environment, compute="local")
    ready = prepare_python(environment, resolved, emit=print)
    program = "import sys; print(sys.base_prefix, *sys.version_info[:2])"
    done = subprocess.run(
        [str(ready.python), "-c", program], capture_output=True, text=True, check=True
    )
    prefix, *version = done.stdout.split()
    assert prefix.startswith(str(tmp_path / "pythons"))
    assert ".".join(version) == WANTED


def test_a_download_that_fails_says_who_asked_for_it(mirror: Path) -> None:
    assert not (mirror / "python.tar.gz").exists()
    environment = EnvironmentSpec(name="e", python_version=WANTED)
    with pytest.raises(EnvironmentBuildError) as error:
        resolve_python(environment, compute="local")
    first, _, said = str(error.value).partition("\n")
    assert f"no usable Python {WANTED} for environment 'e', and it can't be downloaded" in first
    assert "[mlpipelines] python_downloads" in first
    assert "404" in said


def test_nothing_is_downloaded_where_that_is_not_allowed(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIRFLOW__MLPIPELINES__PYTHON_DOWNLOADS")
    environment = EnvironmentSpec(name="e", python_version=WANTED)
    with pytest.raises(EnvironmentBuildError, match=r"\[mlpipelines\] python_downloads = True"):
        resolve_python(environment, compute="local")
    assert mirror.exists()
