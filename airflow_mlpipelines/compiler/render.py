"""The plan of tasks transcribed into Airflow: the one module that makes DAGs and tasks."""

from __future__ import annotations

from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, BaseOperator, Param, TaskGroup
from airflow.sdk.definitions._internal.contextmanager import DagContext

from airflow_mlpipelines.compiler.params import make_param_schemas
from airflow_mlpipelines.compiler.tasks import plan_tasks
from airflow_mlpipelines.definition.graph import REGENERATE_OUTPUTS
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Collection

    from airflow_mlpipelines.compiler.tasks import TaskPlan
    from airflow_mlpipelines.definition.graph import PipelineGraph

DAG_TAG = "mlpipelines"


def to_dag(
    graph: PipelineGraph,
    *,
    dag_id: str | None = None,
    schedule: Any = None,
    wait_for_inputs: bool = False,
    **dag_arguments: Any,
) -> DAG:
    """Return the Airflow DAG of the pipeline.

    Args:
        graph: The checked pipeline.
        dag_id: The DAG's id; the pipeline's name if None.
        schedule: Airflow's own argument; None means that runs are only triggered.
        wait_for_inputs: Whether a run first waits until all its external data is there.
        dag_arguments: Airflow's own arguments of a DAG. Params given here stand beside those that the
            pipeline's parameters become.

    Raises:
        DefinitionError: A param given here has the name of a pipeline parameter.
    """
    _check_params(graph, dag_arguments.get("params") or {})
    arguments: dict[str, Any] = {
        "description": graph.description,
        "catchup": False,
        "doc_md": graph.description,
        **dag_arguments,
    }
    arguments["tags"] = sorted({DAG_TAG, *(arguments.get("tags") or ())})
    dag = DAG(dag_id or graph.name, schedule=schedule, **arguments)
    with dag:
        _render_tasks(graph, wait_for_inputs=wait_for_inputs)
    _add_params(dag, graph)
    return dag


def to_task_group(
    graph: PipelineGraph,
    *,
    group_id: str | None = None,
    wait_for_inputs: bool = False,
    **arguments: Any,
) -> TaskGroup:
    """Return the pipeline as a task group of the DAG that is being defined.

    What is chained behind the group runs when the pipeline is over, whether its steps ran or were
    reused. The pipeline's parameters become params of the DAG.

    Args:
        graph: The checked pipeline.
        group_id: The group's id; the pipeline's name if None.
        wait_for_inputs: Whether the group first waits until all its external data is there.
        arguments: Airflow's own arguments of a TaskGroup.

    Raises:
        DefinitionError: There is no DAG to put it into, or the DAG has a param of the same name.
    """
    dag = DagContext.get_current()
    if dag is None:
        raise DefinitionError(
            f"Pipeline {graph.name!r}: to_task_group() belongs inside a DAG: "
            "`with DAG(...) as dag: group = pipeline.to_task_group()`"
        )
    _check_params(graph, [name for name in dag.params if name != REGENERATE_OUTPUTS])
    with TaskGroup(group_id or graph.name, **arguments) as group:
        _render_tasks(graph, wait_for_inputs=wait_for_inputs)
    _add_params(dag, graph, prefix=group.child_id(""))
    return group


def _check_params(graph: PipelineGraph, own: Collection[str]) -> None:
    clashes = sorted(set(make_param_schemas(graph)).intersection(own))
    if clashes:
        raise DefinitionError(
            f"Pipeline {graph.name!r}: the DAG has params of its own named {clashes}, which are "
            "parameters of the pipeline too. Rename one of them."
        )


def _add_params(dag: DAG, graph: PipelineGraph, *, prefix: str = "") -> None:
    """Give the DAG the pipeline's parameters, after its tasks are made.

    A task copies, checks and serializes all the params that its DAG has by then: with a thousand tasks
    that costs seconds and megabytes. In a run, a task sees its DAG's params anyway.
    """
    for name, (default, schema) in make_param_schemas(graph, prefix=prefix).items():
        if name == REGENERATE_OUTPUTS and name in dag.params:
            # Several pipelines in one DAG share this one.
            steps = list(
                dict.fromkeys([*dag.params.get_param(name).schema["examples"], *schema["examples"]])
            )
            schema |= {"examples": steps, "items": {"type": "string", "enum": steps}}
        dag.params[name] = Param(default, **schema)


def _render_tasks(graph: PipelineGraph, *, wait_for_inputs: bool) -> None:
    classes: dict[str, type[BaseOperator]] = {}
    tasks: dict[str, BaseOperator] = {}
    for plan in plan_tasks(graph, wait_for_inputs=wait_for_inputs):
        if plan.operator not in classes:
            classes[plan.operator] = _load_operator(plan.operator, graph)
        task = tasks[plan.task_id] = _render_task(plan, classes[plan.operator], graph)
        for name in plan.upstream:
            # As set_upstream() does it, which also compares the tasks' DAGs: a seventh of all the time here.
            task.upstream_task_ids.add(tasks[name].task_id)
            tasks[name].downstream_task_ids.add(task.task_id)


def _render_task(
    plan: TaskPlan, operator: type[BaseOperator], graph: PipelineGraph
) -> BaseOperator:
    arguments = dict(plan.arguments)
    if "retry_delay" in arguments:
        arguments["retry_delay"] = timedelta(seconds=arguments["retry_delay"])
    if plan.step is not None:
        arguments["step"] = plan.step
    # Airflow's default weights cost time quadratic in the depth of the graph, at every run.
    return operator(task_id=plan.task_id, graph=graph, weight_rule="absolute", **arguments)


def _load_operator(path: str, graph: PipelineGraph) -> type[BaseOperator]:
    module, _, name = path.partition(":")
    try:
        operator = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DefinitionError(
            f"Pipeline {graph.name!r}: the operator {path!r} can't be imported ({error}). "
            "A step type names its operator as 'package.module:Class'."
        ) from error
    if not (isinstance(operator, type) and issubclass(operator, BaseOperator)):
        raise DefinitionError(f"Pipeline {graph.name!r}: {path!r} is no Airflow operator class")
    return operator
