from __future__ import annotations

import pytest

from airflow_mlpipelines.compiler.params import make_param_schemas
from airflow_mlpipelines.compiler.tasks import plan_tasks, pool_name
from airflow_mlpipelines.definition.graph import (
    DistributedSpec,
    DockerComputeSpec,
    KubernetesComputeSpec,
    LocalComputeSpec,
    ParameterSpec,
)
from tests.helpers import make_graph, make_step


def test_steps_stand_between_the_sensor_and_the_finish():
    graph = make_graph(make_step("a"), make_step("b", after=("a",)), make_step("c", after=("a",)))

    upstream = {task.task_id: task.upstream for task in plan_tasks(graph)}

    assert upstream == {
        "cache_sensor": (),
        "a": ("cache_sensor",),
        "b": ("a",),
        "c": ("a",),
        "finish": ("cache_sensor", "b", "c"),
    }


def test_steps_go_on_after_a_skipped_step_but_not_after_a_skipped_sensor():
    rules = {
        task.task_id: task.arguments.get("trigger_rule")
        for task in plan_tasks(make_graph(make_step("a"), make_step("b", after=("a",))))
    }

    assert rules == {
        "cache_sensor": None,
        "a": "none_failed_min_one_success",
        "b": "none_failed",
        "finish": "none_failed_min_one_success",
    }


def test_order_without_data_is_an_edge_too():
    graph = make_graph(make_step("a"), make_step("b", run_after=("a",)))

    assert plan_tasks(graph)[2].upstream == ("a",)


def test_max_nodes_of_a_compute_become_a_pool():
    graph = make_graph(
        make_step("a"), computes={"local": LocalComputeSpec(name="local", max_nodes=2)}
    )

    assert plan_tasks(graph)[1].arguments["pool"] == pool_name("local") == "mlpipelines_local"


@pytest.mark.parametrize(
    ("compute", "slots"),
    [
        (KubernetesComputeSpec(name="it", image="x", max_nodes=4), 3),
        (DockerComputeSpec(name="it", image="x", max_nodes=4), None),
    ],
    ids=["kubernetes", "docker"],
)
def test_a_step_on_several_nodes_takes_as_many_slots_where_each_is_a_node_of_its_own(
    compute, slots
):
    gang = DistributedSpec(framework="pytorch", nodes=3)
    graph = make_graph(make_step("a", compute="it", distributed=gang), computes={"it": compute})

    assert plan_tasks(graph)[1].arguments.get("pool_slots") == slots


def test_a_pipeline_without_steps_still_finishes():
    assert plan_tasks(make_graph())[-1].upstream == ("cache_sensor",)


def test_a_parameter_becomes_a_schema_that_airflow_checks():
    graph = make_graph(
        make_step("a"),
        parameters=(
            ParameterSpec(name="rate", type="float", default=0.1, minimum=0, maximum=1),
            ParameterSpec(name="kind", type="string", default="x", choices=("x", "y")),
        ),
    )

    schemas = make_param_schemas(graph)

    section = "Pipeline parameters"
    assert schemas["rate"] == (
        0.1,
        {"type": "number", "minimum": 0, "maximum": 1, "section": section},
    )
    assert schemas["kind"] == ("x", {"type": "string", "enum": ["x", "y"], "section": section})
    assert schemas["regenerate_outputs"][0] == []
    assert schemas["regenerate_outputs"][1]["items"]["enum"] == ["all", "a"]
