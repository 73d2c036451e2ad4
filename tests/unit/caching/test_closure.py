"""Which change of which file changes the digest of a script's code."""

from __future__ import annotations

import shutil

import pytest

from airflow_mlpipelines.caching.closure import SourceDirectory, code_digest
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.snapshots import list_source_files


def write(directory, files):
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def digest_of(directory, script="train.py", mode="closure"):
    return code_digest(directory, list_source_files(directory), script, mode=mode)


# What is in the folder; what the script train.py reaches of it; what it does not reach.
REACHING = {
    "an imported module": ({"train.py": "import a", "a.py": "x = 1"}, {"a.py"}, set()),
    "what an imported module imports": (
        {"train.py": "import a", "a.py": "from b import x", "b.py": "x = 1"},
        {"a.py", "b.py"},
        set(),
    ),
    "modules that import each other": (
        {"train.py": "import a", "a.py": "import b", "b.py": "import a, train"},
        {"a.py", "b.py"},
        set(),
    ),
    "a data file beside it": ({"train.py": "x = 1", "words.txt": "a"}, {"words.txt"}, set()),
    "a data file in a folder": ({"train.py": "x = 1", "conf/a.yaml": "a"}, {"conf/a.yaml"}, set()),
    "another step's script": ({"train.py": "x = 1", "report.py": "y = 1"}, set(), {"report.py"}),
    "a module that nobody reaches": (
        {"train.py": "import a", "a.py": "", "b.py": "import c", "c.py": ""},
        {"a.py"},
        {"b.py", "c.py"},
    ),
    "packages on the way": (
        {
            "train.py": "import p.q.m",
            "p/__init__.py": "",
            "p/q/__init__.py": "",
            "p/q/m.py": "",
            "p/q/n.py": "",
        },
        {"p/__init__.py", "p/q/__init__.py", "p/q/m.py"},
        {"p/q/n.py"},
    ),
    "a submodule taken from its package": (
        {"train.py": "from p import m", "p/__init__.py": "", "p/m.py": "", "p/n.py": ""},
        {"p/__init__.py", "p/m.py"},
        {"p/n.py"},
    ),
    "a name taken from a package": (
        {"train.py": "from p import x", "p/__init__.py": "from p.m import x", "p/m.py": "x = 1"},
        {"p/__init__.py", "p/m.py"},
        set(),
    ),
    "relative imports": (
        {
            "train.py": "import p.a",
            "p/__init__.py": "",
            "p/a.py": "from . import b\nfrom .q.c import x\nfrom .q import d",
            "p/b.py": "",
            "p/q/__init__.py": "",
            "p/q/c.py": "from ..e import y",
            "p/q/d.py": "",
            "p/e.py": "",
            "e.py": "",
        },
        {"p/__init__.py", "p/a.py", "p/b.py", "p/q/__init__.py", "p/q/c.py", "p/q/d.py", "p/e.py"},
        {"e.py"},
    ),
    "a namespace package": (
        {"train.py": "from p.q import m", "p/q/m.py": "", "p/n.py": ""},
        {"p/q/m.py"},
        {"p/n.py"},
    ),
    "a module beside a folder of its name": (
        {"train.py": "import features", "features.py": "x = 1", "features/table.csv": "a"},
        {"features.py", "features/table.csv"},
        set(),
    ),
    "a package beside a module of its name": (
        {"train.py": "import a", "a/__init__.py": "", "a.py": ""},
        {"a/__init__.py"},
        {"a.py"},
    ),
    "a conditional import": (
        {
            "train.py": "try:\n    import a\nexcept ImportError:\n    import b",
            "a.py": "",
            "b.py": "",
        },
        {"a.py", "b.py"},
        set(),
    ),
    "an import in a function": (
        {"train.py": "def f():\n    def g():\n        from a import x", "a.py": ""},
        {"a.py"},
        set(),
    ),
    "everything of a package": (
        {
            "train.py": "from p import *",
            "p/__init__.py": "__all__ = ['m']",
            "p/m.py": "",
            "p/q/__init__.py": "",
            "p/q/n.py": "",
        },
        {"p/__init__.py", "p/m.py", "p/q/__init__.py"},
        {"p/q/n.py"},
    ),
    "everything of a package that names no modules": (
        {"train.py": "from p import *", "p/__init__.py": "x = 1", "p/m.py": ""},
        {"p/__init__.py"},
        {"p/m.py"},
    ),
    "everything of a module": (
        {"train.py": "from a import *", "a.py": "x = 1"},
        {"a.py"},
        set(),
    ),
    "a module of another folder, by PYTHONPATH": (
        {"train.py": "import a, b.c", "lib/a.py": "", "src/b/c.py": "", "src/d.py": ""},
        {"lib/a.py", "src/b/c.py"},
        {"src/d.py"},
    ),
    "what a pickle may name": (
        {
            "train.py": "import joblib\nmodel = joblib.load('m')",
            "fit.py": "from models import Model",
            "models.py": "import layers",
            "layers.py": "",
            "report.py": "import sys",
        },
        {"models.py", "layers.py"},
        {"fit.py", "report.py"},
    ),
    "what a pickle that a module loads may name": (
        {
            "train.py": "import a",
            "a.py": "from pandas import read_pickle as read",
            "fit.py": "from models import Model",
            "models.py": "",
        },
        {"a.py", "models.py"},
        {"fit.py"},
    ),
    "what a pickle may name, in a package": (
        {
            "train.py": "import pickle\npickle.load(open('m', 'rb'))",
            "p/__init__.py": "",
            "p/fit.py": "from .models import Model",
            "p/models.py": "",
        },
        {"p/__init__.py", "p/models.py"},
        {"p/fit.py"},
    ),
    "libraries are the environment's": (
        {"train.py": "import numpy.linalg, os.path\nfrom json import load", "other.py": ""},
        set(),
        {"other.py"},
    ),
}


@pytest.mark.parametrize("case", REACHING)
def test_reaches(case, tmp_path):
    files, reached, not_reached = REACHING[case]
    write(tmp_path, files)

    code = digest_of(tmp_path)

    assert not code.whole_folder, code.notes
    assert set(code.files) == {"train.py", *reached}
    for name in reached:
        write(tmp_path, {name: files[name] + "\nchanged = True"})
        assert digest_of(tmp_path).digest != code.digest, f"{name} changed"
        write(tmp_path, {name: files[name]})
    for name in not_reached:
        write(tmp_path, {name: files[name] + "\nchanged = True"})
    assert digest_of(tmp_path).digest == code.digest


@pytest.mark.parametrize(
    ("source", "note"),
    [
        ("import importlib", "train.py:1 imports importlib"),
        ("from importlib import import_module", "imports importlib"),
        ("import importlib.util", "imports importlib"),
        ("x = 1\n__import__('a')", r"train.py:2 uses __import__\(\)"),
        ("load = __import__", r"uses __import__\(\)"),
        ("exec(open('a.py').read())", r"uses exec\(\)"),
        ("import builtins\nbuiltins.exec('1')", r"uses builtins.exec\(\)|uses exec\(\)"),
        ("eval('1 + 1')", r"uses eval\(\)"),
        ("class A:\n    def eval(self): pass\neval('1')", r"uses eval\(\)"),
        ("import runpy", "imports runpy"),
        ("from pkgutil import iter_modules", "imports pkgutil"),
        ("import subprocess", "imports subprocess"),
        ("from subprocess import run", "imports subprocess"),
        ("def f():\n    import subprocess as s", "train.py:2 imports subprocess"),
        ("import os\nos.system('python a.py')", r"uses os.system\(\)"),
        ("import os as o\no.popen('a')", r"uses os.popen\(\)"),
        ("from os import system as run", r"uses os.system\(\)"),
        ("import os\nos.execv('a', [])", r"uses os.execv\(\)"),
        ("import asyncio\nasyncio.create_subprocess_exec('a')", "create_subprocess_exec"),
        ("import sys\nsys.path.insert(0, 'lib')", "uses sys.path"),
        ("from sys import path", "uses sys.path"),
        ("def f(:", "train.py can't be parsed"),
    ],
)
def test_where_imports_cannot_be_followed_the_whole_folder_counts(source, note, tmp_path):
    write(tmp_path, {"train.py": source, "a.py": "x = 1", "broken.py": "def g(:"})

    code = digest_of(tmp_path)

    assert code.whole_folder
    assert set(code.files) == {"train.py", "a.py", "broken.py"}
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(code.notes)
    for name in ("a.py", "broken.py"):
        write(tmp_path, {name: "x = 2"})
        assert digest_of(tmp_path).digest != code.digest
        write(tmp_path, {"a.py": "x = 1", "broken.py": "def g(:"})


def test_a_blind_spot_of_an_imported_module_counts(tmp_path):
    write(tmp_path, {"train.py": "import a", "a.py": "import importlib", "b.py": ""})

    code = digest_of(tmp_path)

    assert code.whole_folder
    assert code.notes == ("a.py:1 imports importlib, which can import anything",)


@pytest.mark.parametrize(
    "source",
    [
        "from importlib import metadata, resources",
        "import importlib.metadata",
        "def eval(model): pass\neval(1)",
        "model.eval()",
        "import re\nre.compile('a')",
        "import pandas as pd\npd.eval('a')",
        "import os\nos.path.join('a')",
        "from helpers import exec\nexec('a')",
        "import multiprocessing",
        "import numpy as np\nnp.load('a.npy', allow_pickle=False)",
    ],
)
def test_what_only_looks_dynamic_keeps_the_closure(source, tmp_path):
    write(tmp_path, {"train.py": source, "report.py": "import other", "other.py": ""})

    code = digest_of(tmp_path)

    assert not code.whole_folder, code.notes
    assert set(code.files) == {"train.py"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads",
        "import torch as t\nt.load('a')",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "import mlflow\nmlflow.sklearn.load_model('a')",
    ],
)
def test_code_that_loads_pickles_reaches_what_anything_imports(source, tmp_path):
    write(tmp_path, {"train.py": source, "report.py": "import other", "other.py": ""})

    assert set(digest_of(tmp_path).files) == {"train.py", "other.py"}


def test_comments_formatting_and_docstrings_do_not_count(tmp_path):
    write(tmp_path, {"train.py": "import a\nx = [1, 2]", "a.py": "def f():\n    return 1"})
    before = digest_of(tmp_path)

    write(
        tmp_path,
        {
            "train.py": '"""Trains."""\n\nimport a  # ours\n\nx = [\n    1,\n    2,\n]\n',
            "a.py": 'def f():\n    """Return 1."""\n    return 1  # one',
        },
    )

    assert digest_of(tmp_path).digest == before.digest


@pytest.mark.parametrize(
    "script",
    [
        "import a\nprint(a.f.__doc__)",
        "import a\nprint(getattr(a.f, '__doc__'))",
        "import a, inspect\nprint(inspect.getdoc(a.f))",
    ],
)
def test_docstrings_count_once_anything_reached_reads_docstrings(script, tmp_path):
    write(tmp_path, {"train.py": script, "a.py": 'def f():\n    """One."""'})
    before = digest_of(tmp_path)

    write(tmp_path, {"a.py": 'def f():\n    """Another."""'})

    assert digest_of(tmp_path).digest != before.digest


def test_comments_count_once_anything_reached_reads_source(tmp_path):
    write(
        tmp_path, {"train.py": "import a\nfrom inspect import getsource\ngetsource(a)", "a.py": ""}
    )
    before = digest_of(tmp_path)

    write(tmp_path, {"a.py": "# a remark"})

    assert digest_of(tmp_path).digest != before.digest


def test_two_checkouts_in_two_folders_have_the_same_digest(tmp_path):
    one, two = tmp_path / "one", tmp_path / "elsewhere" / "two"
    write(one, {"train.py": "import p.a", "p/a.py": "x = 1", "words.txt": "a", "b.py": ""})
    shutil.copytree(one, two)
    (two / "p" / "a.py").touch()

    assert digest_of(one) == digest_of(two)
    assert digest_of(one, mode="folder") == digest_of(two, mode="folder")


def test_a_new_file_shadows_a_library(tmp_path):
    write(tmp_path, {"train.py": "import json"})
    before = digest_of(tmp_path)

    write(tmp_path, {"json.py": ""})

    assert digest_of(tmp_path).digest != before.digest


def test_a_file_with_another_name_is_another_code(tmp_path):
    write(tmp_path, {"train.py": "", "a.txt": "x"})
    before = digest_of(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")

    assert digest_of(tmp_path).digest != before.digest


def test_a_script_in_a_subfolder_imports_from_its_own_folder_first(tmp_path):
    write(
        tmp_path,
        {"steps/train.py": "import a, b", "steps/a.py": "", "a.py": "", "b.py": "", "c.py": ""},
    )

    code = digest_of(tmp_path, "./steps/train.py")

    assert set(code.files) == {"steps/train.py", "steps/a.py", "b.py"}


def test_says_through_which_file_each_module_is_reached(tmp_path):
    write(tmp_path, {"train.py": "import a", "a.py": "import b", "b.py": ""})

    assert digest_of(tmp_path).via == {"a.py": "train.py", "b.py": "a.py"}


def test_the_whole_folder_counts_where_the_author_says_so(tmp_path):
    write(tmp_path, {"train.py": "", "report.py": "x = 1", "words.txt": ""})

    code = digest_of(tmp_path, mode="folder")

    assert set(code.files) == {"train.py", "report.py", "words.txt"}
    assert code.whole_folder
    assert code.notes == ()
    write(tmp_path, {"report.py": "x = 1  # a remark"})
    assert digest_of(tmp_path, mode="folder") == code


@pytest.mark.parametrize("script", [None, "run.sh"])
def test_the_whole_folder_counts_for_programs_that_are_no_python(script, tmp_path):
    write(tmp_path, {"run.sh": "python a.py", "a.py": "x = 1"})

    assert set(digest_of(tmp_path, script).files) == {"run.sh", "a.py"}


def test_many_blind_spots_are_counted(tmp_path):
    write(tmp_path, {"train.py": "\n".join(f"exec({number})" for number in range(9))})

    assert digest_of(tmp_path).notes[-1] == "and 6 more"


def test_a_script_that_is_ignored_is_named(tmp_path):
    write(tmp_path, {"train.py": "", ".amlignore": "train.py"})

    with pytest.raises(DataError, match=r"'train.py' is not among the files .* ignore file"):
        digest_of(tmp_path)


def test_a_file_that_is_gone_is_named(tmp_path):
    write(tmp_path, {"train.py": "", "words.txt": ""})
    files = list_source_files(tmp_path)
    (tmp_path / "words.txt").unlink()

    with pytest.raises(DataError, match=r"words.txt can't be read"):
        code_digest(tmp_path, files, "train.py")


def test_the_scripts_of_a_directory_share_what_was_read(tmp_path):
    write(tmp_path, {"a.py": "import c", "b.py": "import c", "c.py": "", "data.csv": "1"})
    source = SourceDirectory(tmp_path, list_source_files(tmp_path))
    first = source.digest_code("a.py")
    shutil.rmtree(tmp_path)

    assert first.files["c.py"]
    with pytest.raises(DataError, match=r"b.py can't be read"):  # the only one that is not read yet
        source.digest_code("b.py")


def test_names_in_any_encoding_are_told_apart(tmp_path):
    write(tmp_path, {"train.py": ""})
    digests = set()
    for name in (b"\xe9.txt", b"\xc3\xa9.txt", b"e\xcc\x81.txt"):
        path = tmp_path / name.decode("utf-8", "surrogateescape")
        path.write_bytes(b"")
        digests.add(digest_of(tmp_path).digest)
        path.unlink()

    assert len(digests) == 3
