"""What was launched on computes that outlive a worker, and has not been removed since.

Each has a word that only this database knows, and whatever is launched bears it: so who finds it on a cluster that
others use as well can tell that it is ours.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlpipelines.caching.statements import seconds_now, upsert
from airflow_mlpipelines.caching.tables import launches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.caching.index import MetadataIndex


@dataclass(frozen=True)
class LaunchRecord:
    """A step run of which something may be on a compute.

    Attributes:
        word: What is launched for it bears this word.
        attempt: As in :class:`~airflow_mlpipelines.execution.identity.TaskIdentity`.
        nodes: On how many machines it runs.
        site: Where: JSON, as :func:`~airflow_mlpipelines.compute.sites.find_site` returns it.
        age: Seconds since it was launched last, by the database's clock.
    """

    step_run: str
    word: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    attempt: int
    nodes: int
    site: Mapping[str, Any]
    age: float

    @property
    def task(self) -> tuple[str, str, str, int]:
        """The task instance, whatever its attempt."""
        return self.dag_id, self.run_id, self.task_id, self.map_index


class Launches:
    """The launches that one metadata database knows of."""

    def __init__(self, index: MetadataIndex) -> None:
        self._index = index

    def note(
        self,
        step_run: str,
        *,
        task: tuple[str, str, str, int],
        attempt: int,
        nodes: int,
        site: Mapping[str, Any],
    ) -> str:
        """Note that a step run is about to be launched, for the first time or again; return its word.

        Raises:
            CacheError: The database can't be asked.
        """
        dag_id, run_id, task_id, map_index = task
        row = {
            "step_run": step_run,
            "word": uuid.uuid4().hex,
            "dag_id": dag_id,
            "run_id": run_id,
            "task_id": task_id,
            "map_index": map_index,
            "attempt": attempt,
            "nodes": nodes,
            "site": dict(site),
            "noted_at": 0.0,
        }
        is_this = launches.c.step_run == step_run
        with self._index.writing() as connection:
            upsert(connection, launches, [row], update=False)
            changes = {"site": dict(site), "noted_at": seconds_now(connection)}
            connection.execute(sa.update(launches).where(is_this).values(changes))
            return str(connection.execute(sa.select(launches.c.word).where(is_this)).scalar_one())

    def has(self, step_run: str) -> bool:
        """Return whether something of a step run may be left.

        Raises:
            CacheError: The database can't be asked.
        """
        query = sa.select(launches.c.word).where(launches.c.step_run == step_run)
        with self._index.reading() as connection:
            return connection.execute(query).scalar() is not None

    def forget(self, step_run: str) -> None:
        """Note that nothing is left.

        Raises:
            CacheError: The database can't be asked.
        """
        with self._index.writing() as connection:
            connection.execute(sa.delete(launches).where(launches.c.step_run == step_run))

    def list_all(self) -> list[LaunchRecord]:
        """Return all of them.

        Raises:
            CacheError: The database can't be asked.
        """
        with self._index.reading() as connection:
            age = (seconds_now(connection) - launches.c.noted_at).label("age")
            rows = connection.execute(sa.select(launches, age)).mappings().all()
        columns = LaunchRecord.__dataclass_fields__
        return [
            LaunchRecord(**{name: row[name] for name in columns})
            for row in rows
            if isinstance(row["site"], dict)
        ]
