"""Digests of values: different values never meet, equal ones always do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines._digest import digest, encode

TEXT = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates, too
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.binary()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12
)


def shape(value: object) -> object:
    """Return what tells values apart: equal exactly for the same value of the same kind."""
    if isinstance(value, dict):
        return ("dict", frozenset((key, shape(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(shape(item) for item in value))
    sign = math.copysign(1, value) if isinstance(value, float) else None
    return (type(value), value, sign)


@given(VALUES, VALUES)
def test_two_values_have_the_same_bytes_exactly_if_they_are_the_same(one, two):
    assert (encode(one) == encode(two)) == (shape(one) == shape(two))


@given(st.dictionaries(TEXT, VALUES, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_a_mapping_does_not_count(mapping, random):
    items = list(mapping.items())
    random.shuffle(items)

    assert encode(dict(items)) == encode(mapping)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": "1b", "b": "2"}, {"a": "1", "b": "b2"}),
        (["ab", "c"], ["a", "bc"]),
        ([["a"], "b"], [["a", "b"]]),
        (1, "1"),
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (None, "None"),
        ("a", b"a"),
        ({}, []),
        ("é", "e\u0301"),
        ("é", "\udcc3\udca9"),  # how Python spells bytes of a name that are no UTF-8
    ],
)
def test_what_looks_alike_is_told_apart(one, two):
    assert digest("test", one) != digest("test", two)


def test_the_kind_counts():
    assert digest("one", 1) != digest("two", 1)


@pytest.mark.parametrize("value", [object(), [object()], {"a": object()}, math.sin])
def test_a_value_without_a_stable_form_is_refused(value):
    with pytest.raises(TypeError, match="no stable form"):
        encode(value)


def test_digests_are_those_of_the_releases_before():
    value = {"a": [1, -2.5, None, True], "é": "text", "b": b"\x00", "s": {"x", "y"}}

    assert digest("golden", value) == (
        "ae83875c69961207256052e8aa4d2af58ab94b269ec1d31f37a85d9e3b512163"
    )
