"""The code that a step's script reaches, and its digest.

For a Python script: its syntax tree and those of all modules of the source directory that it reaches by
imports, however deep, plus every file of the directory that is no Python. Comments, formatting and
docstrings don't count. Where imports can't be followed (``importlib``, ``exec``, a subprocess), the
whole directory counts, and a note says why. Other programs: the whole directory.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlpipelines._digest import digest, digest_bytes
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_PYTHON = ".py"
_DYNAMIC_CALLS = {"exec", "eval", "__import__", "compile"}
_DYNAMIC_MODULES = {"importlib", "runpy", "imp", "pkgutil"}
_SPAWNING_MODULES = {"subprocess", "multiprocessing", "os.system", "pexpect", "sh"}
_SHOWN_NOTES = 3
# Fields that say where or how something was written, not what it means; `kind` is the u of u"".
_SKIPPED_FIELDS = frozenset({"ctx", "type_comment", "type_ignores", "kind"})


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
    source the same way.

    Args:
        directory: The source directory.
        files: Its files that are not ignored, relative, with ``/``.
        script: The script that the step runs; None for other programs.
        mode: ``closure`` for what the script reaches; ``folder`` for the whole directory.

    Raises:
        DataError: A file can't be read, or the script is not among the files.
    """
    if script is None or mode == "folder" or not script.endswith(_PYTHON):
        return _whole_folder(directory, files, notes=())
    script = PurePosixPath(script).as_posix()
    if script not in files:
        raise DataError(
            f"script {script!r} is not among the files of {directory}; is it excluded by an ignore file?"
        )
    closure = _Closure(directory, files)
    closure.follow(script)
    if closure.notes:
        notes = tuple(closure.notes[:_SHOWN_NOTES])
        return _whole_folder(directory, files, notes=notes)
    digests = dict(closure.digests)
    digests |= {
        name: digest_bytes(_read(directory, name)) for name in files if not name.endswith(_PYTHON)
    }
    return CodeDigest(_digest_of(digests), digests, closure.via)


def _whole_folder(directory: Path, files: Sequence[str], *, notes: tuple[str, ...]) -> CodeDigest:
    """Every file counts; of Python files still only what they mean."""
    digests = {}
    for name in files:
        source = _read(directory, name)
        tree = _parse(source) if name.endswith(_PYTHON) else None
        digests[name] = digest_bytes(source) if tree is None else _tree_digest(tree)
    return CodeDigest(_digest_of(digests), digests, {}, whole_folder=True, notes=notes)


def _digest_of(digests: Mapping[str, str]) -> str:
    return digest("code-v1", digests)


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        raise DataError(
            f"source file {directory / name} can't be read: {error.strerror}"
        ) from error


def _parse(source: bytes) -> ast.Module | None:
    """Return the syntax tree, or None if this Python can't read the source."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


class _Closure:
    """Follows imports from a script through the modules of its directory."""

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        self._directory = directory
        self._files = frozenset(files)
        self._packages = {
            parent.as_posix() for name in files for parent in PurePosixPath(name).parents
        }
        self.digests: dict[str, str] = {}
        self.via: dict[str, str] = {}
        self.notes: list[str] = []

    def follow(self, script: str) -> None:
        """Take in the script and all that it reaches."""
        root = PurePosixPath(script).parent
        pending = [(script, "")]
        while pending:
            name, importer = pending.pop()
            if name in self.digests:
                continue
            if importer:
                self.via[name] = importer
            source = _read(self._directory, name)
            tree = _parse(source)
            if tree is None:
                self.digests[name] = digest_bytes(source)
                self.notes.append(f"{name} can't be parsed")
                continue
            self.digests[name] = _tree_digest(tree)
            self.notes += [f"{name}:{line} {what}" for line, what in _find_dynamic(tree)]
            pending += [(found, name) for found in self._imports(tree, name, root)]

    def _imports(self, tree: ast.Module, importer: str, root: PurePosixPath) -> list[str]:
        """Return the files of the directory that a module imports, in a fixed order.

        Python looks in the script's own folder first, so absolute imports start there.
        """
        found: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found += self._resolve(root, alias.name)
            elif isinstance(node, ast.ImportFrom):
                base = root
                if node.level:
                    base = PurePosixPath(importer).parent
                    for _ in range(node.level - 1):
                        base = base.parent
                found += self._resolve_from(base, node)
        return list(dict.fromkeys(found))

    def _resolve_from(self, base: PurePosixPath, node: ast.ImportFrom) -> list[str]:
        found = self._resolve(base, node.module) if node.module else self._package_files(base)
        package = base / (node.module or "").replace(".", "/")
        for alias in node.names:
            if alias.name == "*":
                continue
            found += self._resolve(package, alias.name)
        return found

    def _resolve(self, base: PurePosixPath, dotted: str) -> list[str]:
        """Return the module's file and the ``__init__.py`` of every package on the way to it."""
        found: list[str] = []
        place = base
        for part in dotted.split("."):
            place = place / part
            module = f"{place.as_posix()}{_PYTHON}"
            if module in self._files and place.as_posix() not in self._packages:
                return [*found, module]
            if place.as_posix() in self._packages:
                found += self._package_files(place)
            elif module in self._files:
                return [*found, module]
            else:
                break
        return found

    def _package_files(self, package: PurePosixPath) -> list[str]:
        init = (package / "__init__.py").as_posix()
        return [init] if init in self._files else []


def _find_dynamic(tree: ast.Module) -> list[tuple[int, str]]:
    """Return the places, by line, where code may be reached that no import statement names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for name in names:
                top = name.split(".")[0]
                if top in _DYNAMIC_MODULES and not name.startswith("importlib.metadata"):
                    found.append((node.lineno, f"imports {top}, which can import anything"))
                elif top in _SPAWNING_MODULES:
                    found.append((node.lineno, f"imports {top}, which can start other programs"))
        elif isinstance(node, ast.Call):
            called = _call_name(node.func)
            if called in _DYNAMIC_CALLS:
                found.append((node.lineno, f"calls {called}()"))
            elif called in ("os.system", "os.popen") or called.startswith(("os.exec", "os.spawn")):
                found.append((node.lineno, f"calls {called}(), which starts other programs"))
        elif isinstance(node, ast.Attribute) and _call_name(node) == "sys.path":
            found.append((node.lineno, "changes where modules are looked for (sys.path)"))
    return sorted(set(found))


def _call_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return ""


def _tree_digest(tree: ast.Module) -> str:
    reads_docstrings = any(
        (isinstance(node, ast.Name) and node.id == "__doc__")
        or (isinstance(node, ast.Attribute) and node.attr == "__doc__")
        for node in ast.walk(tree)
    )
    return digest("syntax-v1", canonical_tree(tree, docstrings=reads_docstrings))


def canonical_tree(node: Any, *, docstrings: bool) -> Any:
    """Return a syntax tree as plain values, equal for sources that mean the same.

    Left out: places, fields that are empty (a newer Python has more of them), and docstrings unless the
    module reads any.
    """
    if isinstance(node, ast.AST):
        fields: dict[str, Any] = {}
        for name, value in ast.iter_fields(node):
            if name in _SKIPPED_FIELDS or value is None or value == []:
                continue
            if name == "body" and not docstrings and _has_docstring(node):
                value = value[1:]  # noqa: PLW2901 - the body without its docstring
            fields[name] = canonical_tree(value, docstrings=docstrings)
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [canonical_tree(item, docstrings=docstrings) for item in node]
    if isinstance(node, complex):
        return ["complex", node.real, node.imag]
    if node is Ellipsis:
        return ["ellipsis"]
    return node


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    first = node.body[0] if node.body else None
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
