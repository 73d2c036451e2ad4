"""What counts as the same source."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from airflow_mlpipelines.caching import syntax
from airflow_mlpipelines.caching.syntax import canonical_form, parse_source
from tests.parts import require_python

SAMPLE = '''
"""A module."""
from __future__ import annotations
import os as system, json
from . import sibling
from ..pkg.sub import (a, b as c)

GLOBAL: int = 0x_FF + 1_000 + 1e-3 + 2j + (-0.0)
big = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF
text = "é" "\\ud800" if u"u" else b"\\x00" or ...


@decorator(option=None, *args, **kwargs)
class Model(Base, metaclass=Meta):
    """Doc."""

    async def fit(self, x, /, y=1, *rest, z, **more) -> "Model":
        """Doc."""
        async with a as b, c:
            yield await x
        return [i async for i in y if i]

    def width(self):
        return f"{self!r:>{w}} {x:{{}}.{p}} {x=} {x:}" f"" "tail"


def match_it(value):
    match value:
        case {"a": [1, *_], **rest} if rest:
            pass
        case Model(x=1) | None:
            nonlocal_ = lambda *a, k=1: (yield)
        case str() as s:
            del s
    try:
        with (open("a") as f, open("b")):
            raise ValueError from None
    except* (OSError, ValueError) as group:
        global GLOBAL
        GLOBAL += 1
    finally:
        while True:
            break
        else:
            continue_ = {**{}, "k": {1, 2}}
    return not a < b <= c is not d, a[1:2, ::3], (b := 3), [*x]
'''


def form(source: str, *, docstrings: bool = False) -> bytes:
    tree = parse_source(source.encode("utf-8", "surrogatepass"))
    assert tree is not None
    return canonical_form(tree, docstrings=docstrings)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x = 1", "x = 1  # a remark"),
        ("x = 1", "\n\n# a remark\nx=1\n"),
        ("x = [1, 2]", "x = [\n    1,\n    2,\n]"),
        ("x = 'a'", 'x = "a"'),
        ("x = u'a'", "x = 'a'"),
        ("x = 255", "x = 0xFF"),
        ("x = 'ab'", "x = 'a' 'b'"),
        ("def f():\n    return 1", 'def f():\n    """What f returns."""\n    return 1'),
        ("x = 1", '"""A module."""\nx = 1'),
        ('def f():\n    """One."""', 'def f():\n    """Another."""'),
        ("if a: pass\nelif b: pass", "if a:\n    pass\nelif b:\n    pass"),
    ],
)
def test_what_means_the_same_has_the_same_form(before, after):
    assert form(before) == form(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = True"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = '1'"),
        ("x = 'a'", "x = b'a'"),
        ("x = 0.0", "x = 0j"),
        ("x = 'a'", "x = a"),
        ("x = None", "x = ..."),
        ("x = 'None'", "x = None"),
        ("x = [1, 2]", "x = [2, 1]"),
        ("x = [1, 2]", "x = (1, 2)"),
        ("x = [[1], 2]", "x = [[1, 2]]"),
        ("f(a, b)", "f(a)(b)"),
        ("f(a=b)", "f(b=a)"),
        ("def f(a, /): pass", "def f(a): pass"),
        ("def f(*, a): pass", "def f(a): pass"),
        ("x = f'{a}'", "x = f'{a!r}'"),
        ("x = f'{a:>{w}}'", "x = f'{a:{w}}'"),
        ("async def f(): pass", "def f(): pass"),
        ("import a.b", "from a import b"),
        ("from . import a", "from .. import a"),
        ("x: int = 1", "x: float = 1"),
        ("f('one')", "f('another')"),
        ("{**a, 'b': c}", "{'b': c, **a}"),
        ("x = '\\ud800'", "x = '\\ud801'"),
    ],
)
def test_what_means_something_else_has_another_form(before, after):
    assert form(before) != form(after)


def test_docstrings_count_where_they_are_asked_for():
    before, after = '"""One."""\nx = 1', '"""Another."""\nx = 1'

    assert form(before) == form(after)
    assert form(before, docstrings=True) != form(after, docstrings=True)


def test_source_of_any_depth_has_a_form():
    branches = "if x == 0:\n    pass\n" + "".join(
        f"elif x == {number}:\n    pass\n" for number in range(1, 90)
    )
    terms = "y = " + " + ".join(["x"] * 900)

    assert form(branches) != form(terms)


def test_numbers_too_long_to_print_have_a_form():
    assert form(f"x = 0x{'f' * 6000}") != form(f"x = 0x{'e' * 6000}")


@pytest.mark.parametrize(
    "source", [b"def f(:", b"x = '", b"\x00", b"\xff\xfe", b"# coding: nonsense\n", b"print 'a'"]
)
def test_source_that_is_no_python_has_no_tree(source):
    assert parse_source(source) is None


@pytest.mark.filterwarnings("error")
def test_a_warning_about_the_source_stays_the_source_s():
    assert parse_source(b'x = "\\d"') is not None


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_other_pythons_give_the_same_form(version, tmp_path):
    python = require_python(version)
    source = tmp_path / "sample.py"
    source.write_text(SAMPLE)
    program = (
        "import hashlib, importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('syntax', sys.argv[1])\n"
        "syntax = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(syntax)\n"
        "tree = syntax.parse_source(open(sys.argv[2], 'rb').read())\n"
        "print(hashlib.sha256(syntax.canonical_form(tree, docstrings=False)).hexdigest())\n"
    )

    done = subprocess.run(
        [python, "-c", program, syntax.__file__, source], capture_output=True, text=True, check=True
    )

    own = hashlib.sha256(form(SAMPLE)).hexdigest()
    assert done.stdout.strip() == own, f"differs from Python {sys.version}"
