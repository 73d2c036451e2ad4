"""The first task of a run: it decides for the whole pipeline, and skips all that is reused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator
from airflow.sdk.exceptions import AirflowFailException, DownstreamTasksSkipped

from airflow_mlpipelines.definition.graph import ExternalDataSpec

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlpipelines.caching.decision import RunPlan
    from airflow_mlpipelines.definition.graph import PipelineGraph

_SENSOR_TASK = "cache_sensor"


class CacheSensor(BaseSensorOperator):
    """Snapshots the code, pins the data, decides for every step, and skips the reused ones at once.

    Its XCom ``plan`` says for every step what was decided and why; a reused step's outputs are in it.

    Where ``wait_for_inputs`` is set, it first waits until all external data is there, with a sensor's
    ``poke_interval``, ``timeout`` and ``mode``.
    """

    ui_color = "#fdf6e3"
    custom_operator_name = "CacheSensor"

    def __init__(
        self, *, graph: PipelineGraph, wait_for_inputs: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.graph = graph
        self.wait_for_inputs = wait_for_inputs

    def poke(self, context: Context) -> bool:
        """Return whether all external data is there."""
        from airflow_mlpipelines.operators.connections import open_stores

        del context
        stores = open_stores(self.graph)
        for step in self.graph.steps:
            for item in step.inputs:
                source = item.source
                if isinstance(source, ExternalDataSpec) and not stores[source.datastore].exists(
                    source.path
                ):
                    self.log.info("Waiting for %s on %s", source.path, source.datastore)
                    return False
        return True

    def execute(self, context: Context) -> None:
        """Plan the run and push the plan; skip the steps that it reuses.

        Raises:
            DownstreamTasksSkipped: Airflow's way to skip many tasks with one call.
            AirflowFailException: The pipeline, its code or its environments can't be read.
        """
        from airflow_mlpipelines.caching.decision import Decision
        from airflow_mlpipelines.exceptions import DefinitionError
        from airflow_mlpipelines.sensors.planning import make_plan

        if self.wait_for_inputs:
            super().execute(context)
        prefix = self.task_id[: -len(_SENSOR_TASK)]
        try:
            plan = make_plan(self.graph, context, prefix, lambda line: self.log.info("%s", line))
        except DefinitionError as error:
            raise AirflowFailException(str(error)) from error
        context["ti"].xcom_push(key="plan", value=plan.to_dict())
        _push_offered_outputs(plan, context, prefix)
        self._log_plan(plan)
        self._clear_up(context)
        reused = [
            f"{prefix}{step_id}"
            for step_id, decision in plan.steps.items()
            if decision.decision is Decision.REUSE
        ]
        if reused:
            raise DownstreamTasksSkipped(tasks=reused)

    def _clear_up(self, context: Context) -> None:
        """Remove what earlier runs have left on the pipeline's computes. Whatever comes of that, the run goes on."""
        from airflow_mlpipelines.sensors.clearing import clear_up_after_others

        try:
            clear_up_after_others(self.graph, context)
        except Exception as error:  # noqa: BLE001 - none of it is this run's own
            self.log.warning("What earlier runs have left can't be looked after: %s", error)

    def _log_plan(self, plan: RunPlan) -> None:
        width = max((len(step_id) for step_id in plan.steps), default=0)
        lines = [
            f"{step_id:<{width}}  {decision.decision:<5}  {decision.reason}"
            for step_id, decision in plan.steps.items()
        ]
        self.log.info("The plan of this run:\n%s", "\n".join(lines))


def _push_offered_outputs(plan: RunPlan, context: Context, prefix: str) -> None:
    """Push what the pipeline as a whole offers and reuses, as if the steps had run.

    Tasks find the outputs of every reused step in the plan. Who asks over REST finds these few where
    they are when the step runs.
    """
    from airflow.sdk.execution_time.xcom import XCom

    ti = context["ti"]
    for step_id, output in plan.offers.values():
        if output in (made := plan.steps[step_id].outputs):
            XCom.set(
                key=output,
                value=made[output].to_dict(),
                dag_id=ti.dag_id,
                task_id=f"{prefix}{step_id}",
                run_id=ti.run_id,
            )
