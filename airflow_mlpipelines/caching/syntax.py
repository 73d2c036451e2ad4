"""What Python source means, as bytes that are the same wherever and however it is written.

Standard library only, and nothing of this package: a test loads this file into other Python versions
and compares what they make of the same source.
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

# Fields that say where or how something was written, not what it means; `kind` is the u of u"".
_SKIPPED_FIELDS = frozenset({"ctx", "type_comment", "type_ignores", "kind"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def parse_source(source: bytes) -> ast.Module | None:
    """Return the syntax tree, or None if this Python can't read the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as invalid escapes: the step will say so itself
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def canonical_form(tree: ast.Module, *, docstrings: bool) -> bytes:
    """Return bytes that are equal for sources that mean the same, and for no others.

    Comments, formatting and places don't count, nor do fields that are empty: a newer Python has more of
    them. Of Python 3.11 to 3.13 each gives the same bytes for the same source.

    Args:
        tree: The tree, however deep: nothing here recurses.
        docstrings: Whether they count, too.
    """
    parts: list[bytes] = []
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.AST):
            fields = _fields_of(node, docstrings=docstrings)
            names = ",".join(name for name, _ in fields)
            parts.append(_tagged(b"n", f"{type(node).__name__}:{names}".encode()))
            pending += [value for _, value in reversed(fields)]
        elif isinstance(node, list):
            parts.append(b"l%d:" % len(node))
            pending += reversed(node)
        else:
            parts.append(_constant(node))
    return b"".join(parts)


def _fields_of(node: ast.AST, *, docstrings: bool) -> list[tuple[str, Any]]:
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and not docstrings and has_docstring(node):
            value = value[1:]  # noqa: PLW2901 - the body without its docstring
        if isinstance(node, ast.JoinedStr) and name == "values":  # Python 3.12 fills in empty text
            value = [part for part in value if not _is_empty_text(part)]  # noqa: PLW2901
        if name not in _SKIPPED_FIELDS and value is not None and value != []:
            fields.append((name, value))
    return fields


def has_docstring(node: ast.AST) -> bool:
    """Whether the node is a module, class or function that begins with a string."""
    if not isinstance(node, _DOCUMENTED) or not node.body:
        return False
    first = node.body[0]
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def _is_empty_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == ""


def _constant(value: Any) -> bytes:
    """Return a constant with its kind: 1, 1.0, True and "1" are four different ones."""
    if isinstance(value, str):
        return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _tagged(b"b", value)
    if isinstance(value, bool) or value is None or value is Ellipsis:
        return _tagged(b"k", repr(value).encode())
    if isinstance(value, int):
        return _tagged(b"i", hex(value).encode())  # hex: decimal digits are limited in number
    if isinstance(value, float):
        return _tagged(b"f", value.hex().encode())
    if isinstance(value, complex):
        return _tagged(b"c", f"{value.real.hex()},{value.imag.hex()}".encode())
    raise TypeError(f"{type(value).__qualname__} is no constant of Python source")


def _tagged(tag: bytes, payload: bytes) -> bytes:
    return b"%s%d:%s" % (tag, len(payload), payload)
