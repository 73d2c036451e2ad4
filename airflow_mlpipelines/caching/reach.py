"""What a module's source reaches: its imports, and the places where no import statement tells."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_IMPORTING_MODULES = frozenset({"importlib", "runpy", "imp", "pkgutil", "zipimport", "pydoc"})
_HARMLESS_MODULES = ("importlib.metadata", "importlib.resources")
_SPAWNING_MODULES = frozenset({"subprocess", "pexpect", "sh", "plumbum", "papermill"})
_RUNNING_BUILTINS = frozenset({"exec", "eval", "compile", "__import__"})
_SPAWNING_CALLS = ("os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn", "pty.spawn")
_SPAWNING_COROUTINES = "asyncio.create_subprocess_"
_IMPORT_SETTINGS = frozenset({"sys.path", "sys.meta_path", "sys.path_hooks"})
_IMPORTING_CALLS = frozenset({"hydra.utils.instantiate", "hydra.utils.get_class"})
_UNPICKLING_CALLS = frozenset(
    f"{module}.{name}"
    for module in ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "torch")
    for name in ("load", "loads", "Unpickler")
) | {"pandas.read_pickle", "shelve.open"}
_MODEL_LOADER = ".load_model"  # of MLflow and its kind
_DOCUMENTING_CALLS = frozenset({"inspect.getdoc", "pydoc.getdoc"})
_SOURCE_READERS = frozenset(
    {"inspect.getsource", "inspect.getsourcelines", "inspect.getcomments", "linecache.getline"}
)


@dataclass(frozen=True)
class ImportStatement:
    """One module that a statement imports, or takes names from.

    Attributes:
        module: Dotted; empty in ``from . import x``.
        names: What is taken from it, each of which may be a module; ``*`` for all.
        level: The number of leading dots.
    """

    module: str
    names: tuple[str, ...] = ()
    level: int = 0


@dataclass(frozen=True)
class Reach:
    """What a module reaches beyond itself.

    Attributes:
        blind_spots: Line and words for each place where it may reach what no statement names.
        unpickles: Whether it loads pickles, which import modules by the names that they hold.
        reads_docstrings: Whether it looks at docstrings, so that they count.
        reads_source: Whether it looks at source text, so that comments count.
    """

    imports: tuple[ImportStatement, ...]
    blind_spots: tuple[tuple[int, str], ...] = ()
    unpickles: bool = False
    reads_docstrings: bool = False
    reads_source: bool = False


def find_reach(tree: ast.Module) -> Reach:
    """Return what the module reaches, wherever in it: conditional and local imports count."""
    nodes = list(ast.walk(tree))
    used = list(_names_used(nodes, _names_bound(tree, nodes)))
    return Reach(
        imports=tuple(_imports(nodes)),
        blind_spots=tuple(sorted({*_blind_imports(nodes), *_blind_uses(used)})),
        unpickles=any(
            dotted in _UNPICKLING_CALLS or dotted.endswith(_MODEL_LOADER) for _, dotted in used
        )
        or any(_allows_pickle(node) for node in nodes),
        reads_docstrings=any(
            dotted in _DOCUMENTING_CALLS or dotted.rpartition(".")[2] == "__doc__"
            for _, dotted in used
        )
        or any(
            (isinstance(node, ast.Constant) and node.value == "__doc__")
            or (isinstance(node, ast.Attribute) and node.attr == "__doc__")
            for node in nodes
        ),
        reads_source=any(dotted in _SOURCE_READERS for _, dotted in used),
    )


def _imports(nodes: list[ast.AST]) -> Iterator[ImportStatement]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield ImportStatement(alias.name)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield ImportStatement(node.module or "", names, node.level)


def _blind_imports(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            top = module.partition(".")[0]
            if top in _IMPORTING_MODULES and not module.startswith(_HARMLESS_MODULES):
                yield getattr(node, "lineno", 0), f"imports {top}, which can import anything"
            elif top in _SPAWNING_MODULES:
                yield getattr(node, "lineno", 0), f"imports {top}, which can start other programs"


def _blind_uses(used: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for line, dotted in used:
        name = dotted.removeprefix("builtins.")
        if name in _RUNNING_BUILTINS:
            yield line, f"uses {name}(), which can run anything"
        elif dotted in _IMPORTING_CALLS:
            yield line, f"uses {dotted}(), which can import anything"
        elif dotted.startswith(_SPAWNING_CALLS) or dotted.startswith(_SPAWNING_COROUTINES):
            yield line, f"uses {dotted}(), which can start other programs"
        elif dotted in _IMPORT_SETTINGS:
            yield line, f"uses {dotted}: modules may come from elsewhere"


def _names_bound(tree: ast.Module, nodes: list[ast.AST]) -> dict[str, str]:
    """Return what names stand for: imported things by their dotted names, the module's own with a dot."""
    bound: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin = "." * node.level + (node.module or "")
                bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
    for statement in tree.body:  # an own function `eval` is not the built-in one
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.setdefault(statement.name, f".{statement.name}")
    return bound


def _names_used(nodes: list[ast.AST], bound: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything used by name, such as ``os.system``."""
    for node in nodes:
        if isinstance(node, (ast.Name, ast.Attribute)):
            dotted = _dotted(node, bound)
            if dotted:
                yield node.lineno, dotted
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr, bound: dict[str, str]) -> str:
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([bound.get(node.id, node.id), *reversed(attributes)])


def _allows_pickle(node: ast.AST) -> bool:
    """Whether the node is a call with ``allow_pickle=`` anything but False, as NumPy has it."""
    return isinstance(node, ast.Call) and any(
        keyword.arg == "allow_pickle"
        and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
        for keyword in node.keywords
    )
