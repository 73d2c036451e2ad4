"""Conda files for processes, with real packages of a channel that is made here: no network is needed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from airflow_mlpipelines.compute.environment_locks import environments_directory
from airflow_mlpipelines.compute.environments import (
    interpreter_variables,
    is_python_ready,
    prepare_python,
    resolve_python,
)
from airflow_mlpipelines.definition.graph import EnvironmentSpec
from airflow_mlpipelines.exceptions import EnvironmentBuildError
from tests.channels import VERSION, make_package, make_python
from tests.parts import missing
from tests.wheels import make_wheel

MINOR = ".".join(VERSION.split(".")[:2])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return tmp_path / "airflow"


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    """A channel with a Python, and ``tiny``, a file that needs it."""
    if importlib.util.find_spec("rattler") is None:
        missing("no py-rattler (the extra 'conda')")
    made = tmp_path / "channel"
    make_python(made)
    make_tiny(made, "1.0")
    return made


def make_tiny(channel: Path, version: str) -> None:
    files = {"share/tiny": f"tiny {version}\n"}
    make_package(channel, "tiny", version, files, depends=("python >=3.8",))


def spec(channel: Path, *dependencies: Any, **fields: Any) -> EnvironmentSpec:
    conda = {"channels": [channel.as_uri()], "dependencies": list(dependencies)}
    return EnvironmentSpec(name="c", conda=conda, **fields)


def prepare(environment: EnvironmentSpec) -> tuple[Path, list[str]]:
    """Return the environment's directory, and what told of its making."""
    lines: list[str] = []
    resolved = resolve_python(environment, compute="local")
    ready = prepare_python(environment, resolved, emit=lines.append)
    assert ready.digest == resolved.digest
    return Path(str(ready.python)).parent.parent, lines


def test_conda_packages_are_installed_once_beside_their_python(channel: Path) -> None:
    environment = spec(channel, f"python={MINOR}", "tiny=1.*")
    assert not is_python_ready(environment)
    directory, lines = prepare(environment)
    assert directory.parent == environments_directory()
    assert (directory / "share" / "tiny").read_text() == "tiny 1.0\n"
    python = str(directory / "bin" / "python")
    shown = subprocess.run(
        [python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str(directory)
    assert lines[0].startswith(f"Building environment 'c': Python {VERSION} and 2 packages.")
    assert prepare(environment) == (directory, [])
    assert is_python_ready(environment)
    assert interpreter_variables(python, "/bin")["CONDA_PREFIX"] == str(directory)
    described = resolve_python(environment, compute="local").description
    assert described["python"] == VERSION
    assert described["packages"]["conda tiny"].startswith("1.0 (0, ")


def test_what_was_resolved_stays_when_the_channel_moves_on(channel: Path) -> None:
    loose, tight = spec(channel, "python", "tiny"), spec(channel, "python", "tiny >=1.1")
    before, _ = prepare(loose)
    make_tiny(channel, "1.5")
    assert prepare(loose) == (before, [])
    after, _ = prepare(tight)
    assert (after / "share" / "tiny").read_text() == "tiny 1.5\n"


def test_pip_packages_of_a_conda_file_leave_its_conda_packages_alone(
    channel: Path, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "1.0", requires="shared")
    for version in ("1.0", "2.0"):
        make_wheel(wheels, version, name="shared")
    place = f"lib/python{MINOR}/site-packages"
    make_package(
        channel,
        "shared",
        "1.0",
        {
            f"{place}/shared.py": "VERSION = 'of conda'\n",
            f"{place}/shared-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: shared\nVersion: 1.0\n",
            f"{place}/shared-1.0.dist-info/RECORD": "",
        },
        depends=("python",),
    )
    pip = {"pip": ["--no-index", f"--find-links={wheels}", "tinypkg"]}
    directory, _ = prepare(spec(channel, f"python={MINOR}", "shared", pip))
    program = "import shared, tinypkg; print(shared.VERSION, tinypkg.VERSION)"
    done = subprocess.run(
        [directory / "bin" / "python", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "of conda 1.0"


def test_a_conda_file_of_python_and_pip_alone_needs_no_conda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rattler", None)
    make_wheel(tmp_path, "1.0")
    pip = {"pip": ["--no-index", f"--find-links={tmp_path}", "tinypkg"]}
    environment = spec(Path("/nowhere"), f"python={MINOR}", "pip", pip)
    directory, _ = prepare(environment)
    assert (directory / "pyvenv.cfg").exists()
    assert list(directory.rglob("tinypkg.py"))
    same = EnvironmentSpec(python_version=MINOR, pip=tuple(pip["pip"]))
    assert prepare(same)[0] == directory


def test_what_conda_can_not_do_is_said_with_a_way_out(
    channel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dependencies, said in (
        (["python", "nopkg"], "can't be resolved: .*nopkg"),
        (["python", "tiny=9"], "can't be resolved: (.|\n)*tiny"),
        (["python", "a b c d"], "can't be resolved: "),
    ):
        with pytest.raises(EnvironmentBuildError, match=f"environment 'c' {said}") as error:
            resolve_python(spec(channel, *dependencies), compute="local")
        assert not error.value.retryable
    with pytest.raises(EnvironmentBuildError, match="environment 'c' can't be resolved"):
        resolve_python(spec(channel.parent / "nowhere", "python", "x"), compute="local")
    monkeypatch.setitem(sys.modules, "rattler", None)
    with pytest.raises(EnvironmentBuildError, match=r"pip install 'airflow-mlpipelines\[conda\]'"):
        resolve_python(spec(channel, "python", "tiny"), compute="local")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_package_that_is_not_what_its_channel_says_is_not_installed(channel: Path) -> None:
    listed = channel / "noarch" / "repodata.json"
    content = json.loads(listed.read_text())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(channel)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    conda: dict[str, Any] = {"channels": [f"http://127.0.0.1:{server.server_port}"]}
    conda["dependencies"] = ["python", "tiny"]
    environment = EnvironmentSpec(name="c", conda=conda)
    try:
        content["packages"]["tiny-1.0-0.tar.bz2"] |= {"sha256": "0" * 64, "md5": "0" * 32}
        listed.write_text(json.dumps(content))
        with pytest.raises(EnvironmentBuildError, match="environment 'c' can't be built: "):
            prepare(environment)
        assert not is_python_ready(environment)
    finally:
        server.shutdown()
        server.server_close()
