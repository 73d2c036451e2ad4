"""Requirement lines that name files of this machine: the files go along into the build context.

So an environment whose packages lie in a directory is the same for a process and for a container.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from airflow_mlpipelines.compute.build_context import ContextFile
from airflow_mlpipelines.definition.url_secrets import PACKAGES_REMEDY, find_secret
from airflow_mlpipelines.exceptions import DataError, EnvironmentBuildError
from airflow_mlpipelines.storage.snapshots import list_source_files

if TYPE_CHECKING:
    from collections.abc import Sequence

LOCAL_DIRECTORY = "local"
_FILE_OPTION = re.compile(r"^(-r|--requirement|-c|--constraint|-f|--find-links)[= ]*(?P<path>.+)$")
_EDITABLE = re.compile(r"^(-e|--editable)[= ]")
_BY_URL = re.compile(r"^(?P<before>[\w.-]+(\[[^\]]*\])?\s*@\s*)(?P<path>file:\S+)")
_BY_PATH = re.compile(r"^(?P<path>(/|\./|\.\./|file:)[^\[;]*?)(?P<after>\[[^\]]*\]|\s*;.*)?$")
_DISTRIBUTIONS = (".whl", ".tar.gz", ".zip", ".tar.bz2")


def collect_requirements(
    named: str, lines: Sequence[str], *, directory: str
) -> tuple[list[str], dict[str, ContextFile]]:
    """Return requirement lines as they are in the image, and the local files that they need there.

    Args:
        named: How messages call the environment.
        lines: The lines as the author wrote them.
        directory: Where in the image the files will lie.

    Returns:
        The lines, and the files by their paths relative to ``directory``.

    Raises:
        EnvironmentBuildError: A local path is relative or not there, a package is editable, or a URL in a
            line or in a file of requirements has a password or a token in it.
    """
    made: list[str] = []
    files: dict[str, ContextFile] = {}
    for line in lines:
        _check_secrets(f"{named}: a requirement line", line)
        if _EDITABLE.match(line):
            raise EnvironmentBuildError(
                f"{named}: {line!r}: nothing is editable in an image. Write the path of the package alone."
            )
        match = _FILE_OPTION.match(line) or _BY_URL.match(line) or _BY_PATH.match(line)
        # The address of a package index may follow -f too.
        if match is None or re.match(r"(?!file:)\w+://", match["path"]):
            made.append(line)
            continue
        path = _local_path(named, line, match["path"].strip())
        place = f"{LOCAL_DIRECTORY}/{len(made)}"
        if line.startswith(("-r", "--req", "-c", "--con")) and path.is_file():
            _check_secrets(f"{named}: {path}", path.read_text("utf-8", errors="replace"))
        found = _read(named, path, place, only_distributions=line.startswith(("-f", "--find")))
        files.update(found)
        target = f"{directory}/{place}/{path.name}"
        if "file:" in match["path"]:
            target = f"file://{target}"
        start, end = match.span("path")
        made.append(f"{line[:start]}{target}{line[end:]}")
    return made, files


def _check_secrets(where: str, text: str) -> None:
    found = find_secret(text)
    if found is not None:
        raise EnvironmentBuildError(
            f"{where} has a URL with a password or a token in it ({found}), which everybody who may pull the image "
            f"could read. {PACKAGES_REMEDY}"
        )


def _local_path(named: str, line: str, text: str) -> Path:
    path = Path(unquote(urlsplit(text).path) if text.startswith("file:") else text)
    if not path.is_absolute():
        raise EnvironmentBuildError(
            f"{named}: {line!r} is relative to a directory that the build does not have. Write the whole path: "
            "str(Path(__file__).parent / …)."
        )
    if not path.exists():
        raise EnvironmentBuildError(
            f"{named}: {line!r}: {path} is not on this machine. The machine that builds the image needs it."
        )
    return path


def _read(
    named: str, path: Path, place: str, *, only_distributions: bool
) -> dict[str, ContextFile]:
    if path.is_file():
        return {f"{place}/{path.name}": ContextFile(path)}
    try:
        names = list_source_files(path)
    except DataError as error:
        raise EnvironmentBuildError(f"{named}: {error}") from error
    if only_distributions:
        names = [name for name in names if "/" not in name and name.endswith(_DISTRIBUTIONS)]
    return {f"{place}/{path.name}/{name}": ContextFile(path / name) for name in names}
