"""What is installed in the worker's own interpreter, without importing or reading any of it."""

from __future__ import annotations

import os
import platform
import re
import site
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUFFIXES = (".dist-info", ".egg-info")
_SEPARATORS = re.compile(r"[-_.]+")


def python_version() -> str:
    """Return the full version of the worker's interpreter, such as ``3.11.7``."""
    return platform.python_version()


def installed_packages() -> dict[str, str]:
    """Return each installed distribution's name, in its normal form, and its version.

    Where a name is installed twice, the one that an import would find counts. An editable install
    counts by its version too: what is edited in it is not seen.
    """
    found: dict[str, str] = {}
    for directory in _package_directories():
        for name, version in _distributions(directory):
            found.setdefault(name, version)
    return dict(sorted(found.items()))


def _package_directories() -> list[str]:
    """Return where packages lie for a program that this interpreter runs, first come first.

    Not ``sys.path``: it differs between the processes of one installation.
    """
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    paths += site.getsitepackages([sys.prefix])
    if sys.prefix != sys.base_prefix and _sees_base(Path(sys.prefix)):
        paths += site.getsitepackages([sys.base_prefix])
    return list(dict.fromkeys(paths))


def _sees_base(prefix: Path) -> bool:
    """Return whether a virtual environment shows the packages of the interpreter it was made from."""
    try:
        settings = (prefix / "pyvenv.cfg").read_text(encoding="utf-8").lower()
    except OSError:
        return False
    return re.search(r"include-system-site-packages\s*=\s*true", settings) is not None


def _distributions(directory: str) -> Iterator[tuple[str, str]]:
    try:
        names = os.listdir(directory)  # noqa: PTH208 - hundreds of names, wanted as text
    except OSError:
        return
    for entry in sorted(names):
        if not entry.endswith(_SUFFIXES):
            continue
        name, _, rest = entry.rpartition(".")[0].partition("-")
        version = rest.partition("-py")[0] if entry.endswith(".egg-info") else rest
        if not version:  # an old develop install keeps it inside
            name, version = _read_metadata(Path(directory, entry)) or (name, "unknown")
        yield _SEPARATORS.sub("-", name).lower(), version


def _read_metadata(entry: Path) -> tuple[str, str] | None:
    from importlib.metadata import PathDistribution

    distribution = PathDistribution(entry)
    name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    return (name, version) if name and version else None
