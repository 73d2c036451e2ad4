"""What an environment's image is built from, and what makes two definitions the same."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.recipes import (
    BaseImage,
    base_names,
    count_unpinned,
    describe_packages,
    make_context,
)
from airflow_mlpipelines.definition.graph import EnvironmentSpec
from airflow_mlpipelines.exceptions import DefinitionError, EnvironmentBuildError

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlpipelines.compute.build_context import BuildContext

ONE, TWO = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
PYTHON = {"python:3.12": BaseImage(f"python@{ONE}", ONE)}
EVERYTHING = """\
FROM python@sha256:1111111111111111111111111111111111111111111111111111111111111111
USER root
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libgomp1 'git=1:2.39.*' && rm -rf /var/lib/apt/lists/*
ENV PATH=${MAMBA_ROOT_PREFIX:-/opt/conda}/bin:$PATH
COPY conda /opt/mlpipelines/environment/conda
RUN if command -v micromamba; then micromamba install -y -n base -f /opt/mlpipelines/environment/conda/environment.yaml; elif command -v mamba; then mamba env update -n base -f /opt/mlpipelines/environment/conda/environment.yaml; elif command -v conda; then conda env update -n base -f /opt/mlpipelines/environment/conda/environment.yaml; else echo 'mlpipelines: the base image has neither conda nor mamba nor micromamba' >&2; exit 65; fi
RUN python3 -c "import sys; found = '.'.join(map(str, sys.version_info[:3])); (found + '.').startswith('3.12.') or sys.exit('mlpipelines: the base image has Python ' + found + ', and 3.12 is asked for')"
COPY pip /opt/mlpipelines/environment/pip
RUN PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -r /opt/mlpipelines/environment/pip/requirements.txt
"""


def context(bases: dict[str, BaseImage] = PYTHON, **fields: Any) -> BuildContext:
    return make_context(EnvironmentSpec(**{"image": "python:3.12", **fields}), bases)


def text(made: BuildContext, name: str) -> str:
    content = made.files[name].content
    assert isinstance(content, bytes)
    return content.decode()


def test_the_dockerfile_has_an_instruction_for_each_kind_of_package() -> None:
    made = context(
        apt=("libgomp1", "git=1:2.39.*"),
        conda={"dependencies": ["numpy"]},
        python_version="3.12",
        pip=("pandas==2.2.3", "rich"),
    )
    assert made.dockerfile == EVERYTHING
    assert text(made, "pip/requirements.txt") == "pandas==2.2.3\nrich\n"
    assert '"numpy"' in text(made, "conda/environment.yaml")


def test_a_definition_is_what_it_was_in_the_releases_before() -> None:
    """A change here builds everybody's images anew, and disowns what was made on them: on purpose only."""
    assert context(pip=("pandas==2.2.3",)).digest == "5c7da0af1912ce066a4faf66d9ebeb25"


def test_packages_are_put_on_the_last_stage_of_a_dockerfile() -> None:
    made = make_context(
        EnvironmentSpec(dockerfile="FROM a AS b\nFROM b\nRUN x", apt=("git",)),
        {"a": BaseImage(f"a@{ONE}", ONE)},
    )
    assert made.dockerfile.startswith(f"FROM a@{ONE} AS b\nFROM b\nRUN x\nUSER root\nRUN apt-get")


def test_a_dockerfile_alone_is_built_as_it_is() -> None:
    made = make_context(
        EnvironmentSpec(dockerfile="FROM a\nUSER me\n"), {"a": BaseImage(f"a@{ONE}", ONE)}
    )
    assert made.dockerfile == f"FROM a@{ONE}\nUSER me\n"
    assert made.files == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"pip": ("rich", "pandas")},
        {"pip": ("pandas==2.2.3", "rich")},
        {"apt": ("git",)},
        {"python_version": "3.12"},
        {"conda": {"dependencies": ["pandas"]}},
        {"bases": {"python:3.12": BaseImage(f"python@{TWO}", TWO)}},
    ],
)
def test_whatever_changes_the_image_changes_the_definition(fields: dict[str, Any]) -> None:
    before = context(pip=("pandas", "rich"))
    assert context(**{"pip": ("pandas", "rich"), **fields}).digest != before.digest


def test_names_and_variables_change_nothing() -> None:
    before = context(pip=("pandas",))
    mirror = {"mirror/python:3": BaseImage(f"mirror/python@{ONE}", ONE)}
    assert context(pip=("pandas",), name="a", environment_variables={"A": "1"}).digest == (
        before.digest
    )
    moved = context(bases=mirror, image="mirror/python:3", pip=("pandas",))
    assert moved.digest == before.digest
    assert moved.dockerfile != before.dockerfile


# ---- bases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "default", "names"),
    [
        ({"image": "a", "pip": ("x",)}, "b", ["a"]),
        ({"pip": ("x",)}, "b", ["b"]),
        ({"python_version": "3.12"}, "b", ["b"]),
        ({"python_version": "3.12"}, None, ["python:3.12-slim"]),
        ({"dockerfile": "FROM a\nCOPY --from=c /x /y\n"}, "b", ["a", "c"]),
    ],
)
def test_the_base_is_the_environments_then_the_computes_then_its_pythons(
    fields: dict[str, Any], default: str | None, names: list[str]
) -> None:
    assert base_names(EnvironmentSpec(**fields), default=default) == names


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pip": ("x",)}, "has no base image.*python_version="),
        ({"dockerfile": "RUN x"}, "has no FROM"),
        ({"python_version": ">=3.9"}, "python_version is '>=3.9'.*'3.12'"),
    ],
)
def test_without_a_base_it_says_how_to_name_one(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(EnvironmentBuildError, match=f"environment 'e'.*{said}"):
        base_names(EnvironmentSpec(name="e", **fields), default=None)


# ---- local files -------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A directory with a wheel, something else, a package's own directory and a file of constraints."""
    (tmp_path / "wheels" / "deep").mkdir(parents=True)
    (tmp_path / "wheels" / "tiny-1-py3-none-any.whl").write_text("wheel")
    (tmp_path / "wheels" / "notes.txt").write_text("not for pip")
    (tmp_path / "wheels" / "deep" / "other-1-py3-none-any.whl").write_text("not looked at by pip")
    (tmp_path / "own" / "__pycache__").mkdir(parents=True)
    (tmp_path / "own" / "pyproject.toml").write_text("[project]")
    (tmp_path / "own" / "__pycache__" / "x.pyc").write_text("")
    (tmp_path / "constraints.txt").write_text("rich<14")
    return tmp_path


def test_local_files_go_along_and_the_lines_name_them_where_they_are(packages: Path) -> None:
    made = context(
        pip=(
            f"--find-links={packages}/wheels",
            f"{packages}/own[extra]",
            f"tiny @ file://{packages}/wheels/tiny-1-py3-none-any.whl ; python_version > '3'",
            f"-c {packages}/constraints.txt",
            "-f https://example.com/wheels",
            "rich",
        )
    )
    place = "/opt/mlpipelines/environment/pip/local"
    assert text(made, "pip/requirements.txt").splitlines() == [
        f"--find-links={place}/0/wheels",
        f"{place}/1/own[extra]",
        f"tiny @ file://{place}/2/tiny-1-py3-none-any.whl ; python_version > '3'",
        f"-c {place}/3/constraints.txt",
        "-f https://example.com/wheels",
        "rich",
    ]
    assert sorted(made.files) == [
        "pip/local/0/wheels/tiny-1-py3-none-any.whl",
        "pip/local/1/own/pyproject.toml",
        "pip/local/2/tiny-1-py3-none-any.whl",
        "pip/local/3/constraints.txt",
        "pip/requirements.txt",
    ]


def test_local_files_of_the_pip_packages_in_a_conda_file_go_along_too(packages: Path) -> None:
    wheel = packages / "wheels" / "tiny-1-py3-none-any.whl"
    made = context(conda={"dependencies": ["python=3.12", {"pip": [f"tiny @ file://{wheel}"]}]})
    place = "/opt/mlpipelines/environment/conda/1/local/0"
    assert json.loads(text(made, "conda/environment.yaml"))["dependencies"] == [
        "python=3.12",
        {"pip": [f"tiny @ file://{place}/{wheel.name}"]},
    ]
    assert sorted(made.files) == [f"conda/1/local/0/{wheel.name}", "conda/environment.yaml"]
    wheel.write_text("another wheel")
    again = context(conda={"dependencies": ["python=3.12", {"pip": [f"tiny @ file://{wheel}"]}]})
    assert again.digest != made.digest
    with pytest.raises(EnvironmentBuildError, match="relative"):
        context(conda={"dependencies": [{"pip": ["./own"]}]})


def test_what_is_in_a_local_file_counts_and_not_where_it_lies(
    packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wheel = packages / "wheels" / "tiny-1-py3-none-any.whl"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / wheel.name
    elsewhere.write_text("wheel")
    before = context(pip=(str(wheel),)).digest
    assert context(pip=(str(elsewhere),)).digest == before
    elsewhere.write_text("another wheel")
    assert context(pip=(str(elsewhere),)).digest != before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("./own", "relative"),
        ("-r more.txt", "relative"),
        ("/nowhere/own", "is not on this machine"),
        ("-e /nowhere/own", "editable"),
        ("--index-url https://me:hunter2@example.com/simple", "password"),
    ],
)
def test_a_line_that_can_not_work_in_an_image_says_so(line: str, said: str) -> None:
    with pytest.raises(EnvironmentBuildError, match=said) as error:
        context(pip=(line,))
    assert "hunter2" not in str(error.value)


def test_a_secret_in_a_file_of_requirements_is_not_put_into_an_image(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("rich\n--extra-index-url https://hunter2@example.com/simple\n")
    for line in (f"-r {file}", f"--requirement={file}", f"-c {file}"):
        with pytest.raises(EnvironmentBuildError, match=r"requirements\.txt has a URL") as error:
            context(pip=(line,))
        assert "hunter2" not in str(error.value)


# ---- the context -------------------------------------------------------------------------------


def test_the_archive_is_the_same_bytes_every_time(packages: Path) -> None:
    line = f"--find-links={packages}/wheels"
    with context(pip=(line,)).open_archive() as archive:
        first = archive.read()
    (packages / "wheels" / "tiny-1-py3-none-any.whl").touch()
    with context(pip=(line,)).open_archive() as archive:
        assert archive.read() == first
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            assert tar.getnames() == [
                "Dockerfile",
                "pip/local/0/wheels/tiny-1-py3-none-any.whl",
                "pip/requirements.txt",
            ]


def test_a_context_is_written_into_an_empty_directory_only(tmp_path: Path) -> None:
    made = context(pip=("rich",))
    made.write(tmp_path / "new")
    assert (tmp_path / "new" / "Dockerfile").read_text() == made.dockerfile
    assert (tmp_path / "new" / "pip" / "requirements.txt").read_text() == "rich\n"
    with pytest.raises(DefinitionError, match="is not empty"):
        made.write(tmp_path / "new")


# ---- for people --------------------------------------------------------------------------------


def test_what_is_asked_for_is_told_by_name() -> None:
    spec = EnvironmentSpec(
        pip=("pandas[sql]==2.2.3", "rich", "--no-index"), apt=("git=1:2.39.*", "curl")
    )
    assert describe_packages(spec, PYTHON) == {
        "base image": ONE,
        "pandas[sql]": "==2.2.3",
        "rich": "any",
        "--no-index": "any",
        "apt git": "1:2.39.*",
        "apt curl": "any",
    }


def test_lines_without_an_exact_version_are_counted() -> None:
    lines = (
        "a==1",
        "b",
        "c>=1",
        "d==1.*",
        "e @ https://x/e.whl",
        "--no-index",
        "/x/f.whl",
        "g===1",
    )
    assert count_unpinned(EnvironmentSpec(pip=lines)) == (3, 8)
