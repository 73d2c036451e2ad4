"""DataTransferStep: Azure ML's arguments, and what can be wrong with them."""

from __future__ import annotations

import pytest

from airflow_mlpipelines import (
    CommandStep,
    DataReference,
    DataTransferStep,
    Pipeline,
    PipelineData,
)
from airflow_mlpipelines.exceptions import DefinitionError, PipelineCheckError


@pytest.fixture
def raw(ws):
    return DataReference(ws.datastores["other"], "raw", "landing/raw")


@pytest.fixture
def lake(ws):
    return DataReference(ws.default_datastore, "lake", "lake/raw")


def test_it_is_a_step_on_the_worker_from_one_place_to_another(ws, raw, lake):
    step = DataTransferStep("move", source_data_reference=raw, destination_data_reference=lake)
    read = CommandStep(["ls", step.get_output()], inputs=[step.get_output()])

    graph = Pipeline(ws, [read]).graph
    spec = graph.step("move")

    assert (spec.type, graph.computes[spec.compute].type) == ("DataTransferStep", "local")
    assert (spec.inputs[0].source.datastore, spec.inputs[0].source.path) == ("other", "landing/raw")
    assert (spec.outputs[0].datastore, spec.config["destination_path"]) == ("store", "lake/raw")
    assert spec.inputs[0].source.pin == "version"  # or it would be read twice
    assert graph.step("ls").upstream == {"move"}


def test_it_moves_what_steps_make_to_where_outputs_go(ws):
    made, moved = PipelineData("made"), PipelineData("moved", datastore=ws.datastores["other"])
    make = CommandStep(["touch", made], outputs=[made])
    step = DataTransferStep("move", made, moved)

    graph = Pipeline(ws, [step, make]).graph

    assert graph.step("move").upstream == {"touch"}
    assert graph.step("move").outputs[0].datastore == "other"
    assert step.get_output() is moved


def test_a_source_that_two_steps_name_differently_is_read_once_for_both(ws, raw, lake):
    step = DataTransferStep("move", raw, lake, pin="content")

    assert Pipeline(ws, [step]).graph.step("move").inputs[0].source.pin == "content"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_data_reference": None}, "source_data_reference is missing"),
        ({"destination_data_reference": "lake"}, "destination_data_reference is a str"),
        ({"source_reference_type": "dir"}, "source_reference_type is 'dir'; it can be 'file' or"),
        (
            {"source_reference_type": "directory", "destination_reference_type": "file"},
            "a directory can't be copied to a file",
        ),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_what_is_wanted(raw, lake, arguments, message):
    given = {"source_data_reference": raw, "destination_data_reference": lake, **arguments}

    with pytest.raises(DefinitionError, match=f"DataTransferStep 'move': {message}"):
        DataTransferStep("move", **given)


@pytest.mark.parametrize(("source", "target"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("", "a")])
def test_a_place_is_not_copied_into_itself(ws, source, target):
    store = ws.default_datastore

    with pytest.raises(DefinitionError, match="lie one in the other"):
        DataTransferStep("move", store.path(source), store.path(target))

    DataTransferStep("move", store.path("a"), store.path("ab"))


def test_it_does_not_run_in_a_container(ws, raw, lake):
    step = DataTransferStep("move", raw, lake, compute_target="cpu-docker")

    with pytest.raises(PipelineCheckError, match=r"moves data on the Airflow worker.*'docker'"):
        _ = Pipeline(ws, [step]).graph
