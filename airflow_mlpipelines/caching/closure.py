"""The code that a step's script reaches, and its digest.

For a Python script: its syntax tree and those of all modules of the source directory that it reaches by
imports, however deep, plus every file of the directory that is no Python. Comments and formatting don't
count, docstrings only where some of that code looks at docstrings. Where imports can't be followed
(``importlib``, ``exec``, a subprocess), the whole directory counts, and a note says why. Code that loads
pickles reaches whatever any file of the directory imports: a pickle names the modules of its classes.
Other programs: the whole directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from airflow_mlpipelines._digest import digest, digest_bytes
from airflow_mlpipelines.caching.reach import ImportStatement, Reach, find_reach
from airflow_mlpipelines.caching.syntax import canonical_form, parse_source
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    import ast
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_PYTHON = ".py"
_INIT = "__init__"
_SHOWN_NOTES = 3


@dataclass(frozen=True)
class CodeDigest:
    """What identifies the code of a step.

    Attributes:
        digest: 64 hex digits.
        files: Each file that counts, relative to the source directory, and its own digest.
        via: Each reached module and the file that imports it, for explanations.
        whole_folder: Whether every file of the directory counts.
        notes: Why, where the author did not ask for it.
    """

    digest: str
    files: Mapping[str, str]
    via: Mapping[str, str] = field(default_factory=dict)
    whole_folder: bool = False
    notes: tuple[str, ...] = ()

    def to_content(self) -> dict[str, Any]:
        """Return the JSON form that the index keeps under the digest."""
        return {
            "kind": "code",
            "files": dict(self.files),
            "via": dict(self.via),
            "whole_folder": self.whole_folder,
            "notes": list(self.notes),
        }


def code_digest(
    directory: Path,
    files: Sequence[str],
    script: str | None,
    *,
    mode: Literal["closure", "folder"] = "closure",
) -> CodeDigest:
    """Return the digest of the code that a step runs.

    It is the same in every place that the directory is copied to, and on every Python that reads the
    source the same way. For several scripts of one directory, use one :class:`SourceDirectory`.

    Args:
        directory: The source directory.
        files: Its files that are not ignored, relative, with ``/``.
        script: The script that the step runs; None for other programs.
        mode: ``closure`` for what the script reaches; ``folder`` for the whole directory.

    Raises:
        DataError: A file can't be read, or the script is not among the files.
    """
    return SourceDirectory(directory, files).digest_code(script, mode=mode)


class _Module(NamedTuple):
    """A Python file as read: its tree is None if this Python can't read it."""

    source: bytes
    tree: ast.Module | None
    reach: Reach


class SourceDirectory:
    """The files of one source directory, each of them read and followed at most once."""

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        self._directory = directory
        self._files = frozenset(files)
        self._modules: dict[str, _Module] = {}
        self._digests: dict[tuple[str, str], str] = {}

    def digest_code(
        self, script: str | None, *, mode: Literal["closure", "folder"] = "closure"
    ) -> CodeDigest:
        """Return what :func:`code_digest` does.

        Raises:
            DataError: A file can't be read, or the script is not among the files.
        """
        if script is not None:
            script = PurePosixPath(script).as_posix()
            if script not in self._files:
                raise DataError(
                    f"script {script!r} is not among the files of {self._directory}; "
                    "is it excluded by an ignore file?"
                )
        if script is None or mode == "folder" or not script.endswith(_PYTHON):
            return self._whole_folder()
        via = self._follow(script)
        reached = [script, *via]
        notes = [note for name in reached for note in self._blind_spots(name)]
        if notes:
            shown = notes[:_SHOWN_NOTES]
            if len(notes) > len(shown):
                shown.append(f"and {len(notes) - len(shown)} more")
            return self._whole_folder(tuple(shown))
        return self._make(reached, via)

    def _whole_folder(self, notes: tuple[str, ...] = ()) -> CodeDigest:
        modules = [name for name in self._files if name.endswith(_PYTHON)]
        return self._make(modules, {}, whole_folder=True, notes=notes)

    def _make(
        self,
        modules: Sequence[str],
        via: Mapping[str, str],
        *,
        whole_folder: bool = False,
        notes: tuple[str, ...] = (),
    ) -> CodeDigest:
        """Digest these modules and all files that are no Python."""
        reaches = [self._module(name).reach for name in modules]
        how = "meaning"
        if any(reach.reads_source for reach in reaches):
            how = "text"
        elif any(reach.reads_docstrings for reach in reaches):
            how = "meaning with docstrings"
        digests = {name: self._digest_module(name, how) for name in modules}
        digests |= {name: self._digest_file(name) for name in self._files if _is_data(name)}
        return CodeDigest(digest("code-v1", digests), digests, via, whole_folder, notes)

    # ---- files -----------------------------------------------------------------------------

    def _digest_module(self, name: str, how: str) -> str:
        key = (name, how)
        if key not in self._digests:
            module = self._module(name)
            if module.tree is None or how == "text":
                self._digests[key] = digest_bytes(module.source)
            else:
                form = canonical_form(module.tree, docstrings=how != "meaning")
                self._digests[key] = digest("syntax-v1", form)
        return self._digests[key]

    def _digest_file(self, name: str) -> str:
        key = (name, "bytes")
        if key not in self._digests:
            self._digests[key] = digest_bytes(self._read(name))
        return self._digests[key]

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            source = self._read(name)
            tree = parse_source(source)
            reach = find_reach(tree) if tree is not None else Reach(imports=())
            self._modules[name] = _Module(source, tree, reach)
        return self._modules[name]

    def _read(self, name: str) -> bytes:
        try:
            return (self._directory / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"source file {self._directory / name} can't be read: {error.strerror}"
            ) from error

    # ---- imports ---------------------------------------------------------------------------

    def _follow(self, script: str) -> dict[str, str]:
        """Return all modules that the script reaches, each with the file that imports it."""
        root = PurePosixPath(script).parent
        via: dict[str, str] = {}
        pending = [script]
        while pending:
            importer = pending.pop()
            reach = self._module(importer).reach
            found = self._resolve_all(reach.imports, importer, root)
            if reach.unpickles:
                found += self._imported_anywhere
            for name in found:
                if name != script and name not in via:
                    via[name] = importer
                    pending.append(name)
        return via

    @cached_property
    def _imported_anywhere(self) -> list[str]:
        """The modules that any file of the directory imports: those that a pickle may name."""
        found: set[str] = set()
        for name in self._files:
            if name.endswith(_PYTHON):
                imports = self._module(name).reach.imports
                found.update(self._resolve_all(imports, name, PurePosixPath(name).parent))
        return sorted(found)

    def _blind_spots(self, name: str) -> list[str]:
        module = self._module(name)
        if module.tree is None:
            return [f"{name} can't be parsed"]
        return [f"{name}:{line} {what}" for line, what in module.reach.blind_spots]

    def _resolve_all(
        self, imports: Iterable[ImportStatement], importer: str, root: PurePosixPath
    ) -> list[str]:
        """Return the files that these statements run, in a fixed order."""
        found: list[str] = []
        for statement in imports:
            if statement.level:
                base = PurePosixPath(importer).parent
                for _ in range(statement.level - 1):
                    base = base.parent
                found += self._existing(base / f"{_INIT}{_PYTHON}")
                found += self._resolve(base, statement)
            else:
                top = statement.module.partition(".")[0]
                for base in self._bases(root, top):
                    found += self._resolve(base, statement)
        return list(dict.fromkeys(found))

    def _bases(self, root: PurePosixPath, top: str) -> list[PurePosixPath]:
        """Return where a top-level module may come from.

        Python looks in the script's own folder first. What is not there may still be found in another
        folder of the directory, if the step's PYTHONPATH names one.
        """
        if self._existing(root / f"{top}{_PYTHON}") or self._existing(
            root / top / f"{_INIT}{_PYTHON}"
        ):
            return [root]
        return self._places.get(top, [])

    @cached_property
    def _places(self) -> dict[str, list[PurePosixPath]]:
        """The folders that hold a module or package, by its name."""
        places: dict[str, set[PurePosixPath]] = {}
        for name in self._files:
            if name.endswith(_PYTHON):
                path = PurePosixPath(name)
                places.setdefault(path.stem, set()).add(path.parent)
                for package in path.parents[:-1]:
                    places.setdefault(package.name, set()).add(package.parent)
        return {name: sorted(parents) for name, parents in places.items()}

    def _resolve(self, base: PurePosixPath, statement: ImportStatement) -> list[str]:
        parts = statement.module.split(".") if statement.module else []
        found = self._walk(base, parts)
        for name in statement.names:
            if name == "*":
                found += self._exported(base.joinpath(*parts))
            else:
                found += self._walk(base, [*parts, name])
        return found

    def _walk(self, base: PurePosixPath, parts: list[str]) -> list[str]:
        """Return the module's file and the ``__init__.py`` of every package on the way to it."""
        found: list[str] = []
        place = base
        for part in parts:
            place = place / part
            init = self._existing(place / f"{_INIT}{_PYTHON}")
            module = self._existing(place.with_name(f"{part}{_PYTHON}"))
            if init:
                found += init
            elif module:
                return found + module
        return found

    def _exported(self, package: PurePosixPath) -> list[str]:
        """Return the modules that ``from package import *`` may import: ``__all__`` can name them."""
        init = (package / f"{_INIT}{_PYTHON}").as_posix()
        if init not in self._files or b"__all__" not in self._module(init).source:
            return []
        return sorted(
            name
            for name in self._files
            if name.endswith(_PYTHON)
            and package in (PurePosixPath(name).parent, PurePosixPath(name).parent.parent)
            and (PurePosixPath(name).parent == package or PurePosixPath(name).stem == _INIT)
        )

    def _existing(self, path: PurePosixPath) -> list[str]:
        name = path.as_posix()
        return [name] if name in self._files else []


def _is_data(name: str) -> bool:
    return not name.endswith(_PYTHON)
