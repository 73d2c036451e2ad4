"""The archives that a step's files travel in: made of a stage, and unpacked where nothing may go wrong."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.kubernetes.channel import ChannelError, CommandError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from airflow_mlpipelines.compute.base import Stage
    from airflow_mlpipelines.compute.kubernetes.pod import PodSpec

Entry = tuple[tarfile.TarInfo, Path | None]
_RECORD = 512
_BUFFER = 256 << 10


@dataclass(frozen=True)
class Member:
    """One entry of the archive that a pod gets: its name there, and what it is on the worker's disk.

    Without a path it is an empty directory, or an empty file.
    """

    name: str
    path: Path | None = None
    follow: bool = False
    is_file: bool = False


def stage_members(stage: Stage, shared: Collection[str] = ()) -> Iterator[Member]:
    """Yield all that the pod of a step needs, in the layout of its containers.

    Of inputs that are ``shared``, there is only something to mount them on.
    """
    for name, path in (
        ("code", stage.code),
        ("run", stage.run),
        ("runtime", stage.runtime),
    ):
        yield from _tree(name, path)
    yield Member("home")
    yield Member("outputs")
    parents = {
        parent
        for path in stage.outputs.values()
        for parent in path.relative_to(stage.outputs_root).parents
        if parent != Path()
    }
    parents |= {
        path.relative_to(stage.outputs_root) for path in stage.outputs.values() if path.is_dir()
    }  # where files to upload are written
    for parent in sorted(parents):
        yield Member(f"outputs/{parent.as_posix()}")
    yield Member("inputs")
    for name, path in stage.inputs.items():
        if f"inputs/{name}" in shared:
            yield Member(f"inputs/{name}")
            if not path.is_dir():
                yield Member(f"inputs/{name}/{path.name}", is_file=True)
        elif path.is_dir():
            yield from _tree(f"inputs/{name}", path)
        else:
            yield Member(f"inputs/{name}")
            yield Member(f"inputs/{name}/{path.name}", path, follow=True)


def make_entries(stage: Stage, spec: PodSpec) -> list[Entry]:
    """Return all that the pod gets, as the user that it runs as.

    Raises:
        CommandError: There is something that is neither a file nor a directory.
    """
    return list(iter_entries(stage, spec))


def iter_entries(stage: Stage, spec: PodSpec) -> Iterator[Entry]:
    """Yield what :func:`make_entries` returns, one after the other."""
    return (_entry(member, spec) for member in stage_members(stage, spec.shared))


def archive_size(entries: Iterable[Entry]) -> int:
    """Return the bytes that :func:`write_archive` will yield."""
    return sum(map(entry_size, entries)) + 2 * _RECORD


def entry_size(entry: Entry) -> int:
    """Return the bytes that one entry takes in the archive."""
    info, _ = entry
    return len(_header(info)) + -(-info.size // _RECORD) * _RECORD


def unpack(archive: tarfile.TarFile, target: Path) -> None:
    """Unpack what a pod has sent below ``target``, as the worker's own files.

    Symbolic links stay as the program made them; nothing is written through them, or elsewhere.

    Raises:
        CommandError: An entry would lie outside.
        ChannelError: It has arrived damaged.
    """
    try:
        archive.extractall(target, filter=_own)  # noqa: S202 - the filter keeps it inside
    except tarfile.FilterError as error:
        raise CommandError(
            f"the pod has sent an archive that can't be unpacked: {error}"
        ) from error
    except tarfile.TarError as error:
        raise ChannelError(f"a damaged archive has arrived: {error}") from error


def _tree(name: str, root: Path) -> Iterator[Member]:
    yield Member(name, root, follow=True)
    for directory, folders, files in os.walk(root):
        folders.sort()
        inside = Path(directory)
        relative = inside.relative_to(root)
        for entry in (*folders, *sorted(files)):
            yield Member((Path(name) / relative / entry).as_posix(), inside / entry)


def _entry(member: Member, spec: PodSpec) -> tuple[tarfile.TarInfo, Path | None]:
    if member.path is None:
        info = tarfile.TarInfo(member.name)
        info.type, info.mode = (
            (tarfile.REGTYPE, 0o644) if member.is_file else (tarfile.DIRTYPE, 0o755)
        )
        path = None
    else:
        path = member.path.resolve() if member.follow else member.path
        found = path.lstat()
        with tarfile.TarFile(os.devnull, "w") as nowhere:
            # Of an archive of its own, so that a second hard link to a file becomes a file of its own.
            info = nowhere.gettarinfo(path, member.name)
        if not (info.isreg() or info.isdir() or info.issym()):
            raise CommandError(
                f"{path} is neither a file nor a directory: it can't be sent to a pod"
            )
        # Whom the worker may read for may be somebody else there.
        info.mode = found.st_mode & 0o777 | (0o700 if info.isdir() else 0o600)
    info.uid, info.gid, info.uname, info.gname = spec.uid, spec.gid, "", ""
    return info, path


def _header(info: tarfile.TarInfo) -> bytes:
    # GNU's format: the tar of small images does not know the newer one's long names.
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def write_archive(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield an archive, in pieces, of exactly the size that its entries say."""
    rest = b""
    for info, path in entries:
        rest += _header(info)
        if info.isreg() and path is not None:
            left = info.size
            with path.open("rb") as file:
                while left:
                    data = file.read(min(_BUFFER, left))
                    if not data:
                        raise CommandError(f"{path} became shorter while it was sent")
                    left -= len(data)
                    yield rest + data
                    rest = b""
            rest = b"\0" * (-info.size % _RECORD)
        if len(rest) > _BUFFER:
            yield rest
            rest = b""
    yield rest + b"\0" * (2 * _RECORD)


def _own(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return None  # devices, pipes and sockets are no data
    if member.islnk():
        member = tarfile.data_filter(member, path)
    else:
        member = tarfile.tar_filter(member, path)
    mode = 0o700 if member.isdir() else 0o600
    return member.replace(
        uid=None,  # type: ignore[arg-type]
        gid=None,  # type: ignore[arg-type]
        uname=None,  # type: ignore[arg-type]
        gname=None,  # type: ignore[arg-type]
        mode=(member.mode or 0) | mode,
        deep=False,
    )
