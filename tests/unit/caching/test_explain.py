"""Differences in words."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.caching.decision import MissReason
from airflow_mlpipelines.caching.explain import (
    describe_change,
    find_differences,
    find_nearest,
    join_differences,
)
from tests.unit.caching.index_contract import make_run

CONTENTS = {
    "code-1": {
        "files": {"train.py": "1", "a.py": "1", "old.csv": "1"},
        "via": {"a.py": "train.py"},
    },
    "code-2": {
        "files": {"train.py": "1", "a.py": "2", "new.csv": "1"},
        "via": {"a.py": "train.py"},
    },
    "code-3": {
        "files": {"train.py": "3", "a.py": "1", "old.csv": "1", "report.py": "1"},
        "whole_folder": True,
        "notes": ["train.py:3 imports importlib, which can import anything"],
    },
    "python-1": {
        "kind": "python",
        "python": "3.11.7",
        "packages": {"pandas": "2.2.3", "gone": "1"},
        "variables": {"A": "pa55w0rd"},
    },
    "python-2": {
        "kind": "python",
        "python": "3.12.1",
        "packages": {"pandas": "2.3.0", "new": "1"},
        "variables": {"A": "another"},
    },
    "image-1": {"kind": "image", "image": "python:3.12-slim", "digest": "sha256:1"},
    "image-2": {"kind": "image", "image": "python:3.12-slim", "digest": "sha256:2"},
    "damaged": {},
}


def literal(*texts):
    return [[["literal", text]] for text in texts]


@pytest.mark.parametrize(
    ("before", "after", "phrases"),
    [
        ({}, {}, []),
        (
            {"code": "code-1"},
            {"code": "code-2"},
            ["a.py changed (via train.py)", "new.csv is new", "old.csv is gone"],
        ),
        (
            {"code": "code-1"},
            {"code": "code-3"},
            [
                "train.py changed",
                "the whole folder counts, as train.py:3 imports importlib, which can import anything",
            ],
        ),
        ({"code": "code-3"}, {"code": "code-1"}, ["train.py changed"]),
        ({"code": "code-1"}, {"code": "unknown"}, ["its code changed"]),
        ({"code": "code-1"}, {"code": None}, ["the step has no source directory now"]),
        ({"code": None}, {"code": "code-1"}, ["the step has a source directory now"]),
        (
            {"parameters": {"learning_rate": 0.1, "gone": 1, "n": 1}},
            {"parameters": {"learning_rate": 0.2, "new": "x", "n": 1}},
            ["gone is gone", "learning_rate 0.1 -> 0.2", "new x is new"],
        ),
        ({"parameters": {"n": 1}}, {"parameters": {"n": "1"}}, ["n 1 -> '1'"]),
        ({"parameters": {"n": 1}}, {"parameters": {"n": True}}, ["n 1 -> True"]),
        ({"parameters": {"n": "a"}}, {"parameters": {"n": "b\n\0"}}, ["n a -> b\\n\\x00"]),
        (
            {"parameters": {"n": "a"}},
            {"parameters": {"n": "b" * 99}},
            [f"n a -> {'b' * 40}…"],
        ),
        (
            {"step": {"params": {"depth": 1}, "script": "a.py", "version": None}},
            {"step": {"params": {"depth": 2}, "script": "b.py", "version": "2"}},
            ["param depth 1 -> 2", "script a.py -> b.py", "version None -> 2"],
        ),
        (
            {"step": {"arguments": literal("--fast", "1")}},
            {"step": {"arguments": literal("--fast", "2")}},
            ["argument 1 -> 2"],
        ),
        (
            {"step": {"arguments": [[["literal", "--in="], ["input", "raw"]]]}},
            {"step": {"arguments": [[["literal", "--in="], ["input", "table"]]]}},
            ["argument --in={raw} -> --in={table}"],
        ),
        (
            {"step": {"command": literal("a", "b")}},
            {"step": {"command": literal("b", "a")}},
            ["command changed"],
        ),
        (
            {"step": {"environment_variables": {"A": "1", "B": "1"}, "secrets": ["X"]}},
            {"step": {"environment_variables": {"A": "2", "C": "1"}, "secrets": []}},
            [
                "environment variable A changed",
                "environment variable B is gone",
                "environment variable C is new",
                "secrets changed",
            ],
        ),
        (
            {"environment": "python-1"},
            {"environment": "python-2"},
            [
                "Python 3.11.7 -> 3.12.1",
                "gone is gone",
                "new 1 is new",
                "pandas 2.2.3 -> 2.3.0",
                "environment variable A changed",
            ],
        ),
        (
            {"environment": "image-1"},
            {"environment": "image-2"},
            ["image python:3.12-slim has another digest"],
        ),
        (
            {"environment": "python-1"},
            {"environment": "image-1"},
            ["its environment is the image python:3.12-slim now, and was Python"],
        ),
        ({"environment": "python-1"}, {"environment": "unknown"}, ["its environment changed"]),
        (
            {"inputs": {"clean": "1", "gone": "1"}},
            {"inputs": {"clean": "2", "new": "1"}},
            ["input 'clean' has other content", "input 'gone' is gone", "input 'new' is new"],
        ),
        ({"code": "damaged"}, {"code": "code-3"}, None),
        ({"environment": "damaged"}, {"environment": "python-1"}, None),
    ],
)
def test_says(before, after, phrases):
    found = find_differences(before, after, CONTENTS)

    assert found == phrases if phrases is not None else found


def test_many_differences_are_one_bounded_line():
    line = join_differences([f"file_{number}.py changed" for number in range(25)])

    assert line.count("; ") == 10
    assert line.endswith("; and 15 more")


def test_the_nearest_run_is_the_one_with_most_in_common_and_of_equals_the_newest():
    ingredients = {"code": "2", "parameters": {"a": 1, "b": 2}}
    runs = [
        make_run(run_id="damaged", ingredients=None),
        make_run(run_id="far", ingredients={"code": "1", "parameters": {"a": 9, "b": 9}}),
        make_run(run_id="near", ingredients={"code": "2", "parameters": {"a": 9, "b": 2}}),
        make_run(run_id="near, older", ingredients={"code": "2", "parameters": {"a": 1, "b": 9}}),
    ]

    assert find_nearest(ingredients, runs).run_id == "near"
    assert find_nearest(ingredients, runs[:1]) is None


def test_a_step_that_never_ran_is_said_to_be_new():
    assert describe_change(None, {}, {}) == (
        MissReason.NEVER_RUN,
        "never ran before in this pipeline",
    )


def test_a_step_whose_entry_is_lost_is_said_to_be_forgotten():
    reason = describe_change(make_run(ingredients={"code": "1"}), {"code": "1"}, {})

    assert reason == (MissReason.CHANGED, "its earlier outputs are not remembered")
