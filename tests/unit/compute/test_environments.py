"""Python environments, of small packages that are made here: no network is needed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from airflow_mlpipelines.compute.environment_locks import environments_directory
from airflow_mlpipelines.compute.environments import (
    interpreter_variables,
    prepare_python,
    resolve_python,
)
from airflow_mlpipelines.compute.interpreter import installed_packages, python_version
from airflow_mlpipelines.definition.graph import EnvironmentSpec
from airflow_mlpipelines.exceptions import EnvironmentBuildError
from tests.parts import require_python
from tests.wheels import make_wheel


def spec(*pip: str, **fields: Any) -> EnvironmentSpec:
    return EnvironmentSpec(name="tiny", pip=("--no-index", *pip), **fields)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return tmp_path / "airflow"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    directory = tmp_path / "index"
    directory.mkdir()
    return directory


def run(environment: EnvironmentSpec, code: str) -> str:
    lines: list[str] = []
    resolved = resolve_python(environment, compute="local")
    ready = prepare_python(environment, resolved, emit=lines.append)
    assert ready.python is not None
    done = subprocess.run([ready.python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# ---- the worker's own interpreter ---------------------------------------------------------------


@pytest.mark.parametrize(
    "environment", [None, EnvironmentSpec(environment_variables={"LEVEL": "3"})]
)
def test_without_packages_it_is_the_workers_own(environment: EnvironmentSpec | None) -> None:
    resolved = resolve_python(environment, compute="local")
    assert resolved.description["kind"] == "python"
    assert resolved.description["python"] == python_version()
    assert resolved.description["packages"]["pydantic"]
    assert set(resolved.description["variables"]) == ({"LEVEL"} if environment else set())
    assert "3" not in resolved.description["variables"].values()  # it may be a password
    assert resolved.cacheable
    assert prepare_python(environment, resolved, emit=print).python == sys.executable
    assert not environments_directory().exists()


def test_variables_count() -> None:
    one = resolve_python(EnvironmentSpec(environment_variables={"A": "1"}), compute="local")
    two = resolve_python(EnvironmentSpec(environment_variables={"A": "2"}), compute="local")
    assert one.digest != two.digest


def test_what_is_installed_is_what_importlib_says() -> None:
    from importlib.metadata import distributions

    sites = [path for path in sys.path if path.endswith("site-packages")]
    said = {
        item.metadata["Name"].lower().replace("_", "-").replace(".", "-"): item.version
        for item in distributions(path=sites)
    }
    assert installed_packages() == dict(sorted(said.items()))


def test_a_version_is_seen_in_any_form_of_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Some_Thing-1.0.dist-info", "old.one-2.0-py3.11.egg-info", "dev_one.egg-info"):
        (tmp_path / name).mkdir()
    (tmp_path / "dev_one.egg-info" / "PKG-INFO").write_text(
        "Metadata-Version: 2.1\nName: dev-one\nVersion: 3.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = installed_packages()
    assert (found["some-thing"], found["old-one"], found["dev-one"]) == ("1.0", "2.0", "3.0")


# ---- environments with packages -----------------------------------------------------------------


def test_packages_are_installed_once(index: Path) -> None:
    make_wheel(index, "1.0", requires="otherpkg>=2")
    make_wheel(index, "2.5", name="otherpkg")
    environment = spec(f"--find-links={index}", "tinypkg")
    lines: list[str] = []
    resolved = resolve_python(environment, compute="local")
    assert resolved.description["packages"] == {"otherpkg": "2.5", "tinypkg": "1.0"}
    assert resolved.description["python"] == python_version()
    ready = prepare_python(environment, resolved, emit=lines.append)
    assert "environment 'tiny'" in lines[0]
    assert "uv:  + tinypkg==1.0" in lines
    assert re.match(r"Built environment 'tiny' in .* in \d+\.\d s$", lines[-1])
    assert "2 packages" in lines[0]
    assert ready.digest == resolved.digest
    told = list(lines)
    assert prepare_python(environment, resolved, emit=lines.append) == ready
    assert lines == told
    assert run(environment, "import tinypkg; print(tinypkg.VERSION)") == "1.0"


def test_a_version_counts(index: Path) -> None:
    make_wheel(index, "1.0")
    make_wheel(index, "2.0")
    digests = set()
    for version in ("1.0", "2.0"):
        environment = spec(f"--find-links={index}", f"tinypkg=={version}")
        digests.add(resolve_python(environment, compute="local").digest)
        assert run(environment, "import tinypkg; print(tinypkg.VERSION)") == version
    assert len(digests) == 2


def test_what_was_resolved_stays_when_the_index_moves_on(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    before = resolve_python(environment, compute="local")
    make_wheel(index, "2.0")
    assert resolve_python(environment, compute="local") == before
    assert run(environment, "import tinypkg; print(tinypkg.VERSION)") == "1.0"


def test_a_local_package_counts_by_its_content(index: Path) -> None:
    wheel = make_wheel(index, "1.0", body="A = 1\n")
    environment = spec(f"tinypkg @ file://{wheel}")
    before = resolve_python(environment, compute="local")
    assert run(environment, "import tinypkg; print(tinypkg.A)") == "1"
    make_wheel(index, "1.0", body="A = 22\n")
    after = resolve_python(environment, compute="local")
    assert after.digest != before.digest
    assert run(environment, "import tinypkg; print(tinypkg.A)") == "22"


def test_a_local_folder_counts_by_its_content(index: Path) -> None:
    (index / "pyproject.toml").write_text(
        '[project]\nname = "tinypkg"\nversion = "1.0"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (index / "tinypkg.py").write_text("A = 1\n")
    (index / "backend.py").write_text("")  # never called: this only resolves
    environment = spec(f"tinypkg @ file://{index}")
    before = resolve_python(environment, compute="local")
    (index / "tinypkg.py").write_text("A = 2\n")
    assert resolve_python(environment, compute="local").digest != before.digest


def test_a_half_built_environment_is_built_anew(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    run(environment, "pass")
    (ready,) = environments_directory().glob("*.ready")
    ready.unlink()
    (built,) = environments_directory().glob("*/bin/python")
    for module in built.parent.parent.rglob("tinypkg.py"):
        module.unlink()
    assert run(environment, "import tinypkg; print(tinypkg.VERSION)") == "1.0"


def test_an_environment_whose_interpreter_is_gone_is_built_anew(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    run(environment, "pass")
    (built,) = environments_directory().glob("*/bin/python")
    built.unlink()
    built.symlink_to("/no/such/python")
    assert run(environment, "import tinypkg; print(tinypkg.VERSION)") == "1.0"


def test_a_builder_that_was_killed_leaves_no_half_environment(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    resolve_python(environment, compute="local")
    builder = os.fork()
    if builder == 0:

        def die_when_it_begins(line: str) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        prepare_python(
            environment, resolve_python(environment, compute="local"), emit=die_when_it_begins
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(builder, 0)[1]) == -signal.SIGKILL
    assert run(environment, "import tinypkg; print(tinypkg.VERSION)") == "1.0"


def test_many_at_once_build_it_once(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    lines: list[str] = []

    def prepare(_: int) -> str | None:
        resolved = resolve_python(environment, compute="local")
        return prepare_python(environment, resolved, emit=lines.append).python

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(prepare, range(4)))
    assert len(found) == 1
    assert [line.startswith("Building") for line in lines].count(True) == 1


def test_a_lock_of_another_version_or_half_a_lock_is_resolved_anew(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    before = resolve_python(environment, compute="local")
    (lock,) = (environments_directory() / "locks").glob("*.json")
    for text in ('{"ver', json.dumps({"version": 99}), "[]", json.dumps({"version": 1})):
        lock.write_text(text)
        assert resolve_python(environment, compute="local") == before


def test_a_warm_environment_costs_no_process(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    run(environment, "pass")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: pytest.fail("a process"))
    resolved = resolve_python(environment, compute="local")
    prepare_python(environment, resolved, emit=print)


@pytest.mark.python38
def test_another_python_is_taken_from_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = require_python("3.8")
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    environment = EnvironmentSpec(python_version="3.8")
    assert run(environment, "import sys; print(sys.version_info[:2])") == "(3, 8)"
    described = resolve_python(environment, compute="local").description
    assert described["python"].startswith("3.8.")
    assert described["packages"] == {}


def test_a_step_gets_the_python_that_it_wants_and_not_the_workers(
    monkeypatch: pytest.MonkeyPatch, index: Path
) -> None:
    wanted = "3.13" if python_version().startswith("3.12.") else "3.12"
    other = require_python(wanted)
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg", python_version=wanted)
    code = "import sys, tinypkg; print(*sys.version_info[:2], tinypkg.VERSION, sep='.')"
    assert run(environment, code) == f"{wanted}.1.0"
    own = resolve_python(spec(f"--find-links={index}", "tinypkg"), compute="local")
    assert resolve_python(environment, compute="local").digest != own.digest


def test_the_workers_own_python_is_taken_where_its_version_fits() -> None:
    minor = ".".join(python_version().split(".")[:2])
    assert run(EnvironmentSpec(python_version=minor), "import sys; print(sys.base_prefix)") == (
        sys.base_prefix
    )


def test_the_process_finds_the_environment_first(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg")
    resolved = resolve_python(environment, compute="local")
    python = prepare_python(environment, resolved, emit=print).python
    assert python is not None
    variables = interpreter_variables(python, "/usr/bin")
    assert variables["PATH"] == f"{Path(python).parent}:/usr/bin"
    assert variables["VIRTUAL_ENV"] == str(Path(python).parent.parent)
    assert interpreter_variables(sys.executable, None).keys() == {"PATH"}


# ---- what can't be had --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (EnvironmentSpec(name="e", image="python:3.12"), "is an image.*Docker compute"),
        (EnvironmentSpec(name="e", dockerfile="FROM x"), "is an image.*Docker compute"),
        (EnvironmentSpec(name="e", conda={"dependencies": []}), "has no python among its dep"),
        (
            EnvironmentSpec(
                name="e", conda={"dependencies": ["python=3.9"]}, python_version="3.12"
            ),
            r"python_version is 3\.12, but its conda file says 3\.9",
        ),
        (
            EnvironmentSpec(name="e", conda={"channels": ["defaults"], "dependencies": ["python"]}),
            "Name channels, such as 'conda-forge'",
        ),
        (
            EnvironmentSpec(name="e", conda={"dependencies": ["python", {"npm": []}]}),
            "neither a package nor a list of pip packages",
        ),
        (EnvironmentSpec(name="e", apt=("git",), pip=("x",)), "apt packages.*Docker compute"),
        (EnvironmentSpec(name="e", pip=("--no-index", "nopkg")), "can't be resolved(.|\n)*nopkg"),
        (EnvironmentSpec(name="e", pip=("a b c",)), "can't be resolved"),
        (EnvironmentSpec(name="e", python_version="3.99"), "no usable Python 3.99.*worker's PATH"),
    ],
)
def test_what_cannot_be_had_is_said_with_a_way_out(environment: EnvironmentSpec, said: str) -> None:
    with pytest.raises(EnvironmentBuildError, match=said) as error:
        resolve_python(environment, compute="local")
    assert "environment 'e'" in str(error.value)


def test_of_an_image_with_packages_a_process_gets_the_packages(index: Path) -> None:
    make_wheel(index, "1.0")
    environment = spec(f"--find-links={index}", "tinypkg", image="python:3.12")
    assert run(environment, "import tinypkg; print(tinypkg.VERSION)") == "1.0"
