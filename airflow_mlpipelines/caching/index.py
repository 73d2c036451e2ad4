"""The metadata index: what each fingerprint made, what the ingredients were, what happened."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlpipelines.caching.schema import database_errors, open_engine
from airflow_mlpipelines.caching.statements import is_among, newest_of_each, upsert
from airflow_mlpipelines.caching.tables import cache_entries, contents, plans, step_runs
from airflow_mlpipelines.exceptions import CacheError, DataError
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy.engine import Connection, RowMapping

    _Row = sa.FromClause

log = logging.getLogger(__name__)

RAN, REUSED, FAILED = "ran", "reused", "failed"
"""How a step run can end."""

_SHOWN_PREFIX = 64


@dataclass(frozen=True)
class CacheEntry:
    """What a fingerprint was found to make.

    Attributes:
        step: The id of the step that was first to make it.
        seconds: What making it took.
        writer: Whose entry it is.
        step_run: The id of the step run that made it.
    """

    fingerprint: str
    pipeline: str
    step: str
    step_type: str
    outputs: Mapping[str, Artifact]
    ingredients: Mapping[str, Any]
    seconds: float
    writer: str
    step_run: str
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class StepRunRecord:
    """One time that a step ran, was reused or failed.

    Attributes:
        state: :data:`RAN`, :data:`REUSED` or :data:`FAILED`.
        reason: Why it was not reused, or why it was, in words; of a failed one, the error.
    """

    dag_id: str
    run_id: str
    task_id: str
    pipeline: str
    step: str
    step_run: str
    state: str
    reason: str
    map_index: int = -1
    try_number: int = 1
    fingerprint: str | None = None
    ingredients: Mapping[str, Any] | None = None
    outputs: Mapping[str, Artifact] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_saved: float = 0.0
    finished_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class MetadataIndex:
    """The metadata database. Cheap to make; the database is opened when it is first asked."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open = threading.local()

    @property
    def engine(self) -> sa.Engine:
        """The SQLAlchemy engine, migrated to this release."""
        return open_engine(self._url)

    # ---- transactions ----------------------------------------------------------------------

    def writing(self) -> AbstractContextManager[Connection]:
        """One transaction, committed at the end of the block, or undone if it raises.

        What the same thread does with this index inside of the block takes part in it.

        Raises:
            CacheError: The database can't be asked.
        """
        return self._transaction(reads_only=False)

    def reading(self) -> AbstractContextManager[Connection]:
        """One transaction that changes nothing, and waits for nobody; or the one that is open.

        Raises:
            CacheError: The database can't be asked.
        """
        return self._transaction(reads_only=True)

    @contextmanager
    def _transaction(self, *, reads_only: bool) -> Iterator[Connection]:
        joined = getattr(self._open, "connection", None)
        if joined is not None:
            yield joined
            return
        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=reads_only) as connection,
            connection.begin(),
        ):
            self._open.connection = None if reads_only else connection
            try:
                yield connection
            finally:
                self._open.connection = None

    # ---- cache entries ---------------------------------------------------------------------

    def find_entries(self, fingerprints: Collection[str]) -> dict[str, CacheEntry]:
        """Return the entries that there are for these fingerprints.

        An entry that can't be read is left out, with one warning: a damaged entry is a miss.

        Raises:
            CacheError: The database can't be asked.
        """
        found: dict[str, CacheEntry] = {}
        with self.reading() as connection:
            wanted = is_among(connection, cache_entries.c.fingerprint, fingerprints)
            for row in connection.execute(sa.select(cache_entries).where(wanted)).mappings():
                entry = _read_entry(row)
                if entry is not None:
                    found[entry.fingerprint] = entry
        return found

    def find_newest_entries(self, pipeline: str, steps: Collection[str]) -> dict[str, CacheEntry]:
        """Return the newest entry of each of these steps, by fingerprint: likely hits, in one query.

        Raises:
            CacheError: The database can't be asked.
        """

        def of_pipeline(entry: _Row) -> sa.ColumnElement[bool]:
            return entry.c.pipeline == pipeline

        with self.reading() as connection:
            query = newest_of_each(
                connection, cache_entries, steps, order="created_at", count=1, where=of_pipeline
            )
            entries = [_read_entry(row) for row in connection.execute(query).mappings()]
        return {entry.fingerprint: entry for entry in entries if entry is not None}

    def put_entry(self, entry: CacheEntry) -> None:
        """Remember what a fingerprint makes; it replaces an earlier entry, whole or not at all."""
        self.put_entries([entry])

    def put_entries(self, entries: Sequence[CacheEntry]) -> None:
        """Remember several entries, all of them or none. They are of different fingerprints."""
        rows = [
            {
                **{column: getattr(entry, column) for column in _PLAIN_ENTRY_COLUMNS},
                "outputs": _dump_outputs(entry.outputs),
                "ingredients": dict(entry.ingredients),
            }
            for entry in entries
        ]
        with self.writing() as connection:
            upsert(connection, cache_entries, rows, update=True)

    def list_entries(
        self, *, pipeline: str | None = None, step: str | None = None, limit: int = 100
    ) -> list[CacheEntry]:
        """Return the newest entries, newest first."""
        query = sa.select(cache_entries).order_by(cache_entries.c.created_at.desc()).limit(limit)
        if pipeline is not None:
            query = query.where(cache_entries.c.pipeline == pipeline)
        if step is not None:
            query = query.where(cache_entries.c.step == step)
        with self.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [entry for entry in map(_read_entry, rows) if entry is not None]

    def get_entry(self, prefix: str) -> CacheEntry:
        """Return the entry whose fingerprint begins with ``prefix``.

        Raises:
            CacheError: None does, or several do.
        """
        query = (
            sa.select(cache_entries)
            .where(cache_entries.c.fingerprint.startswith(prefix, autoescape=True))
            .limit(2)
        )
        with self.reading() as connection:
            rows = connection.execute(query).mappings().all()
        entries = [entry for entry in map(_read_entry, rows) if entry is not None]
        if len(entries) != 1:
            count = "no" if not entries else "more than one"
            raise CacheError(
                f"{count} cache entry has a fingerprint that begins with {prefix[:_SHOWN_PREFIX]!r}"
            )
        return entries[0]

    # ---- contents --------------------------------------------------------------------------

    def put_contents(self, items: Mapping[str, Any]) -> None:
        """Keep ingredients that many entries share, by digest."""
        if not items:
            return
        with self.reading() as connection:
            query = sa.select(contents.c.digest).where(
                is_among(connection, contents.c.digest, items)
            )
            known = set(connection.execute(query).scalars())
        rows = [
            {"digest": digest, "content": content}
            for digest, content in items.items()
            if digest not in known
        ]
        if rows:
            with self.writing() as connection:
                upsert(connection, contents, rows, update=False)

    def get_contents(self, digests: Collection[str]) -> dict[str, Any]:
        """Return the contents that are kept under these digests, and can be read."""
        with self.reading() as connection:
            wanted = is_among(connection, contents.c.digest, digests)
            rows = connection.execute(sa.select(contents).where(wanted)).all()
        return {row.digest: row.content for row in rows if isinstance(row.content, dict)}

    # ---- plans -----------------------------------------------------------------------------

    def put_plan(self, dag_id: str, run_id: str, task_id: str, plan: Mapping[str, Any]) -> None:
        """Keep the plan that a task made for its run; it replaces an earlier one of that task."""
        row = {"dag_id": dag_id, "run_id": run_id, "task_id": task_id, "plan": dict(plan)}
        with self.writing() as connection:
            upsert(connection, plans, [row], update=True)

    def find_plan(self, dag_id: str, run_id: str, task_id: str) -> dict[str, Any] | None:
        """Return the plan that a task made for its run, in its JSON form, or None."""
        query = sa.select(plans.c.plan).where(
            plans.c.dag_id == dag_id, plans.c.run_id == run_id, plans.c.task_id == task_id
        )
        with self.reading() as connection:
            found: dict[str, Any] | None = connection.execute(query).scalar()
        return found

    # ---- step runs -------------------------------------------------------------------------

    def record_step_runs(self, records: Sequence[StepRunRecord]) -> None:
        """Note what happened."""
        if not records:
            return
        rows = [
            {
                **{column: getattr(record, column) for column in _PLAIN_RUN_COLUMNS},
                "reason": _storable(record.reason),
                "ingredients": dict(record.ingredients) if record.ingredients is not None else None,
                "outputs": _dump_outputs(record.outputs),
                "metrics": dict(record.metrics),
            }
            for record in records
        ]
        with self.writing() as connection:
            connection.execute(sa.insert(step_runs), rows)

    def find_step_runs(
        self,
        *,
        dag_id: str | None = None,
        run_id: str | None = None,
        task_id: str | None = None,
        step: str | None = None,
        limit: int | None = 1000,
    ) -> list[StepRunRecord]:
        """Return what happened, newest first; all of it if ``limit`` is None."""
        query = sa.select(step_runs).order_by(step_runs.c.id.desc()).limit(limit)
        wanted = {"dag_id": dag_id, "run_id": run_id, "task_id": task_id, "step": step}
        for column, value in wanted.items():
            if value is not None:
                query = query.where(step_runs.c[column] == value)
        with self.reading() as connection:
            return [_read_run(row) for row in connection.execute(query).mappings()]

    def find_earlier_runs(
        self, pipeline: str, steps: Collection[str], *, depth: int = 5
    ) -> dict[str, list[StepRunRecord]]:
        """Return, for each of these steps, the last few runs that had outputs, newest first."""
        found: dict[str, list[StepRunRecord]] = {}

        def had_outputs(run: _Row) -> sa.ColumnElement[bool]:
            return sa.and_(
                run.c.pipeline == pipeline, run.c.state != FAILED, run.c.ingredients.is_not(None)
            )

        with self.reading() as connection:
            query = newest_of_each(
                connection, step_runs, steps, order="id", count=depth, where=had_outputs
            )
            for row in connection.execute(query).mappings():
                found.setdefault(row["step"], []).append(_read_run(row))
        return found


_PLAIN_ENTRY_COLUMNS = (
    "fingerprint",
    "pipeline",
    "step",
    "step_type",
    "seconds",
    "writer",
    "step_run",
    "created_at",
)
_PLAIN_RUN_COLUMNS = (
    "dag_id",
    "run_id",
    "task_id",
    "map_index",
    "try_number",
    "pipeline",
    "step",
    "step_run",
    "state",
    "reason",
    "fingerprint",
    "seconds",
    "seconds_saved",
    "finished_at",
)


def _storable(text: str) -> str:
    """Return a text without what no database takes: it may quote what a program printed."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _dump_outputs(outputs: Mapping[str, Artifact]) -> dict[str, Any]:
    return {name: artifact.to_dict() for name, artifact in outputs.items()}


def _read_entry(row: RowMapping) -> CacheEntry | None:
    try:
        outputs = {name: Artifact.from_dict(item) for name, item in row["outputs"].items()}
        return CacheEntry(
            **{column: row[column] for column in _PLAIN_ENTRY_COLUMNS},
            outputs=outputs,
            ingredients=dict(row["ingredients"]),
        )
    except (DataError, AttributeError, TypeError, ValueError) as error:
        log.warning(
            "Cache entry %s can't be read and counts as a miss: %s", row["fingerprint"], error
        )
        return None


def _read_run(row: RowMapping) -> StepRunRecord:
    try:
        outputs = {name: Artifact.from_dict(item) for name, item in row["outputs"].items()}
    except (DataError, AttributeError):  # what happened is worth showing all the same
        outputs = {}
    ingredients, metrics = row["ingredients"], row["metrics"]
    return StepRunRecord(
        **{column: row[column] for column in _PLAIN_RUN_COLUMNS},
        ingredients=ingredients if isinstance(ingredients, dict) else None,
        outputs=outputs,
        metrics=metrics if isinstance(metrics, dict) else {},
    )
