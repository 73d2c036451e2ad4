"""Build contexts: a Dockerfile and the files that it copies, byte for byte the same on every machine."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from airflow_mlpipelines._digest import digest_bytes
from airflow_mlpipelines.exceptions import DefinitionError
from airflow_mlpipelines.storage.trees import digest_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DOCKERFILE = "Dockerfile"
_EXECUTABLE, _PLAIN = 0o755, 0o644


@dataclass(frozen=True)
class ContextFile:
    """A file of a build context: its text, or a file of this machine."""

    content: bytes | Path

    @property
    def digest(self) -> str:
        """64 hex digits over its bytes, and whether it may be executed."""
        if isinstance(self.content, bytes):
            return digest_bytes(self.content)
        found = digest_file(bytes(self.content)).hex()
        return f"{found}+x" if self.mode == _EXECUTABLE else found

    @property
    def mode(self) -> int:
        """Its permissions, of which only the right to execute is kept."""
        if isinstance(self.content, bytes) or not self.content.stat().st_mode & 0o100:
            return _PLAIN
        return _EXECUTABLE


@dataclass(frozen=True)
class BuildContext:
    """What an image is built from.

    Attributes:
        dockerfile: Its text.
        files: All other files, by their paths relative to the context, with ``/``.
        digest: 32 hex digits that identify the definition: what is built, on which base, by which release's
            recipe. Neither the name of a base counts, nor where local files lie.
    """

    dockerfile: str
    files: Mapping[str, ContextFile]
    digest: str

    def open_archive(self) -> IO[bytes]:
        """Return an open temporary file with the context as tar: the same bytes for the same context."""
        archive = tempfile.TemporaryFile()  # noqa: SIM115 - whoever builds closes it
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, file in self._all_files().items():
                entry = tarfile.TarInfo(name)
                entry.mode = file.mode
                if isinstance(file.content, bytes):
                    entry.size = len(file.content)
                    tar.addfile(entry, io.BytesIO(file.content))
                else:
                    entry.size = file.content.stat().st_size
                    with file.content.open("rb") as source:
                        tar.addfile(entry, source)
        archive.seek(0)
        return archive

    def write(self, directory: Path) -> None:
        """Write the context into a directory, which is made if it is not there.

        Raises:
            DefinitionError: The directory is not empty.
        """
        prepare_directory(directory)
        for name, file in self._all_files().items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.content, bytes):
                target.write_bytes(file.content)
            else:
                shutil.copyfile(file.content, target)
            target.chmod(file.mode)

    def _all_files(self) -> dict[str, ContextFile]:
        dockerfile = ContextFile(self.dockerfile.encode())
        return dict(sorted({**self.files, DOCKERFILE: dockerfile}.items()))


def prepare_directory(directory: Path) -> None:
    """Make a directory to export something into, if it is not there.

    Raises:
        DefinitionError: It is not empty.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise DefinitionError(f"{directory} is not empty: name one that is, or a new one")
