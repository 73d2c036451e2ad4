"""What counts in a step's fingerprint, and what does not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines.caching.fingerprint import step_fingerprint
from airflow_mlpipelines.definition.graph import (
    DistributedSpec,
    ExternalDataSpec,
    InputPart,
    InputSpec,
    LiteralPart,
    OutputPart,
    OutputSpec,
    ParameterRef,
    ResourcesSpec,
)
from tests.helpers import make_step

VALUES = st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans()

BASE = {
    "type": "PythonScriptStep",
    "script": "train.py",
    "arguments": (
        (LiteralPart(text="--rate"),),
        (ParameterRef(name="rate"),),
        (LiteralPart(text="--in="), InputPart(name="from_clean")),
        (OutputPart(name="out"),),
    ),
    "params": {"depth": 3, "seed": ParameterRef(name="seed")},
    "environment_variables": {"LEVEL": "info"},
    "secrets": {"TOKEN": "hub"},
    "version": "1",
    "config": {"a": [1, {"b": None}]},
}


def fingerprint(step=None, **changes):
    fields = {
        "code": "c" * 64,
        "environment": "e" * 64,
        "parameters": {"rate": 0.1, "seed": 1, "unused": "x"},
        "inputs": {"from_clean": f"blake3:{'1' * 64}"},
        "destinations": {"store": "memory://store"},
    }
    step = step or make_step("train", after=("clean",), **BASE)
    return step_fingerprint(step, **{**fields, **changes})


def changed_step(**fields):
    return make_step("train", after=("clean",), **{**BASE, **fields})


def test_the_fingerprint_is_that_of_the_releases_before():
    """A change here disowns everything that anybody has cached: raise FINGERPRINT_KIND, on purpose."""
    assert (
        fingerprint().digest == "45c5d96a31b07aa5b7689b4e4760bd6bcc76d1235f0c4688cc7969f82ea80054"
    )


def test_a_distribution_without_a_chief_counts_as_it_did_before_there_was_one():
    spec = DistributedSpec(framework="tensorflow", nodes=2, parameter_servers=1)
    plain = fingerprint(changed_step(distributed=spec))
    chief = fingerprint(changed_step(distributed=spec.model_copy(update={"chief": True})))

    assert plain.ingredients["step"]["distributed"] == {
        "framework": "tensorflow",
        "nodes": 2,
        "processes_per_node": 1,
        "parameter_servers": 1,
    }
    assert chief.digest != plain.digest


def test_the_ingredients_are_kept_whole_and_survive_json():
    ingredients = fingerprint().ingredients

    assert json.loads(json.dumps(ingredients)) == ingredients
    assert ingredients["code"] == "c" * 64
    assert ingredients["environment"] == "e" * 64
    assert ingredients["parameters"] == {"rate": 0.1, "seed": 1}
    assert ingredients["inputs"] == {"from_clean": f"blake3:{'1' * 64}"}


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "other"},
        {"name": "other"},
        {"compute": "gpu"},
        {"resources": ResourcesSpec(cpus=4, gpus=1)},
        {"retries": 3},
        {"retry_delay_seconds": 1.0},
        {"timeout_seconds": 60.0},
        {"description": "Trains."},
        {"allow_reuse": False},
        {"run_after": ("other",)},
        {"secrets": {"TOKEN": "another_connection"}},
        {"source_directory": "/somewhere/else"},
        {"outputs": (OutputSpec(name="out", datastore="store", pipeline_output_name="model"),)},
    ],
)
def test_what_leaves_the_outputs_as_they_are_does_not_count(fields):
    assert fingerprint(changed_step(**fields)).digest == fingerprint().digest


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "CommandStep"},
        {"script": "fit.py"},
        {"command": ((LiteralPart(text="python"),),)},
        {"arguments": BASE["arguments"][::-1]},
        {"arguments": BASE["arguments"][:3]},
        {"arguments": (*BASE["arguments"], (LiteralPart(text="--fast"),))},
        {"params": {**BASE["params"], "depth": 4}},
        {"params": {**BASE["params"], "depth": 3.0}},
        {"params": {**BASE["params"], "depth": "3"}},
        {"params": {"depth": 3, "other": ParameterRef(name="seed")}},
        {"environment_variables": {"LEVEL": "debug"}},
        {"environment_variables": {}},
        {"secrets": {}},
        {"version": "2"},
        {"version": None},
        {"config": {"a": [1, {"b": 0}]}},
        {"outputs": (OutputSpec(name="out", datastore="store", is_directory=True),)},
        {"outputs": (OutputSpec(name="model", datastore="store"),)},
    ],
)
def test_what_the_step_does_counts(fields):
    assert fingerprint(changed_step(**fields)).digest != fingerprint().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "d" * 64},
        {"code": None},
        {"environment": "f" * 64},
        {"parameters": {"rate": 0.2, "seed": 1}},
        {"parameters": {"rate": "0.1", "seed": 1}},
        {"parameters": {"rate": 0.1, "seed": True}},
        {"inputs": {"from_clean": f"blake3:{'2' * 64}"}},
        {"inputs": {"from_clean": None}},
        {"destinations": {"store": "memory://another"}},
    ],
)
def test_what_it_works_on_counts(changes):
    assert fingerprint(**changes).digest != fingerprint().digest


def test_parameters_that_the_step_does_not_use_do_not_count():
    changed = {"rate": 0.1, "seed": 1, "unused": "another"}

    assert fingerprint(parameters=changed).digest == fingerprint().digest


def test_ignored_names_do_not_count():
    step = changed_step(ignore=("seed", "depth"))
    other = changed_step(ignore=("seed", "depth"), params={**BASE["params"], "depth": 9})

    assert (
        fingerprint(step, parameters={"rate": 0.1, "seed": 2}).digest
        == fingerprint(other, parameters={"rate": 0.1, "seed": 3}).digest
    )


def test_where_an_input_comes_from_does_not_count():
    source = ExternalDataSpec(name="raw", datastore="store", path="clean.csv")
    moved = changed_step(inputs=(InputSpec(name="from_clean", source=source),))

    assert fingerprint(moved).digest == fingerprint().digest


def test_no_value_of_a_secret_or_an_environment_variable_is_kept():
    step = changed_step(
        secrets={"TOKEN": "hub_connection"}, environment_variables={"PASSWORD": "pa55w0rd"}
    )

    kept = json.dumps(fingerprint(step).ingredients)

    assert "TOKEN" in kept
    assert "PASSWORD" in kept
    assert "hub_connection" not in kept
    assert "pa55w0rd" not in kept


@given(VALUES, VALUES)
def test_typed_values_never_collide(one, two):
    same = type(one) is type(two) and repr(one) == repr(two)

    assert (
        fingerprint(parameters={"rate": one, "seed": 1}).digest
        == fingerprint(parameters={"rate": two, "seed": 1}).digest
    ) == same


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_params_does_not_count(names):
    step = changed_step(params=dict.fromkeys(names, 1), environment_variables={})
    ordered = changed_step(params=dict.fromkeys("abcd", 1), environment_variables={})

    assert fingerprint(step).digest == fingerprint(ordered).digest


def test_a_parameter_without_a_value_is_an_error():
    with pytest.raises(KeyError, match=r"rate|seed"):
        fingerprint(parameters={})
