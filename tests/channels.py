"""A conda channel made on the spot, so that no test needs one of the network's."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VERSION = ".".join(map(str, sys.version_info[:3]))


def make_package(
    channel: Path, name: str, version: str, files: dict[str, str], *, depends: tuple[str, ...] = ()
) -> None:
    """Put a package of text files into a channel; text that begins with ``->`` is a link's target."""
    noarch = channel / "noarch"
    noarch.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "name": name,
        "version": version,
        "build": "0",
        "build_number": 0,
        "depends": list(depends),
        "subdir": "noarch",
    }
    path = noarch / f"{name}-{version}-0.tar.bz2"
    paths = []
    with tarfile.open(path, "w:bz2") as archive:
        for place, text in files.items():
            entry = tarfile.TarInfo(place)
            entry.mode = 0o755
            data = text.encode()
            kind = "softlink" if text.startswith("->") else "hardlink"
            if kind == "softlink":
                entry.type, entry.linkname, data = tarfile.SYMTYPE, text[2:], b""
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
            paths.append(
                {
                    "_path": place,
                    "path_type": kind,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size_in_bytes": len(data),
                }
            )
        info = {"index.json": about, "paths.json": {"paths": paths, "paths_version": 1}}
        for place, content in info.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"info/{place}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    data = path.read_bytes()
    listed = noarch / "repodata.json"
    known = json.loads(listed.read_text()) if listed.exists() else {"packages": {}}
    known["packages"][path.name] = {
        **about,
        "md5": hashlib.md5(data).hexdigest(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }
    listed.write_text(json.dumps({"info": {"subdir": "noarch"}, **known}))


def make_python(channel: Path) -> None:
    """Put a ``python`` into a channel: a virtual environment of the one that runs the tests."""
    minor = ".".join(VERSION.split(".")[:2])
    base = sys.base_prefix
    make_package(
        channel,
        "python",
        VERSION,
        {
            "bin/python": f"->{base}/bin/python{minor}",
            "bin/python3": "->python",
            "pyvenv.cfg": f"home = {base}/bin\nversion = {VERSION}\n",
            f"lib/python{minor}/site-packages/README.txt": "packages\n",
        },
    )
