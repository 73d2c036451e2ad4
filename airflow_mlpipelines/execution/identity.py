"""Which task instance of which run this is, and the ids that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_mlpipelines._digest import digest
from airflow_mlpipelines._naming import make_identifier


@dataclass(frozen=True)
class TaskIdentity:
    """One Airflow task instance.

    Attributes:
        attempt: Airflow's ``max_tries``: the same for all retries, another one after somebody cleared
            the task. So what a lost worker left is found by the retry, but a clear starts anew.
        try_number: Counts every try, from 1.
    """

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1
    attempt: int = 0
    try_number: int = 1

    @property
    def step_run_id(self) -> str:
        """The id of the step run: safe as a file name, a container name and a label value."""
        fields = [self.dag_id, self.run_id, self.task_id, self.map_index, self.attempt]
        return f"mlp-{digest('step-run-v1', fields)[:20]}"

    @property
    def task(self) -> tuple[str, str, str, int]:
        """The task instance, whatever its attempt."""
        return self.dag_id, self.run_id, self.task_id, self.map_index

    @property
    def holder(self) -> str:
        """Who holds a lease, for people and for comparison."""
        return f"{self.sender}#{self.attempt}"

    @property
    def sender(self) -> str:
        """Who sends files to places of others: the same for every try, also after a clear."""
        return f"{self.dag_id}/{self.run_id}/{self.task_id}[{self.map_index}]"

    @property
    def has_tries_left(self) -> bool:
        """Whether Airflow tries again if this try fails."""
        return self.try_number <= self.attempt

    @property
    def labels(self) -> dict[str, str]:
        """The labels of whatever is launched for it."""
        return {
            "dag_id": self.dag_id,
            "run_id": self.run_id,
            "task_id": self.task_id,
            "map_index": str(self.map_index),
            "try_number": str(self.try_number),
        }

    def directory(self, pipeline: str, step_id: str) -> str:
        """Return where on a datastore the outputs of this step run go."""
        return f"{make_identifier(pipeline)}/{make_identifier(step_id)}/{self.step_run_id}"
