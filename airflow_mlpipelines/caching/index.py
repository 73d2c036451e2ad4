"""The metadata index: what each fingerprint made, what the ingredients were, what happened."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from airflow_mlpipelines.caching.schema import open_engine
from airflow_mlpipelines.caching.tables import cache_entries, contents, plans, step_runs
from airflow_mlpipelines.exceptions import CacheError, DataError
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from sqlalchemy.engine import Connection, RowMapping

    _Row = sa.FromClause

log = logging.getLogger(__name__)

RAN, REUSED, FAILED = "ran", "reused", "failed"
"""How a step run can end."""

_CHUNK = 500
"""Rows in one INSERT."""
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

    @property
    def engine(self) -> sa.Engine:
        """The SQLAlchemy engine, migrated to this release."""
        return open_engine(self._url)

    # ---- cache entries ---------------------------------------------------------------------

    def find_entries(self, fingerprints: Collection[str]) -> dict[str, CacheEntry]:
        """Return the entries that there are for these fingerprints.

        An entry that can't be read is left out, with one warning: a damaged entry is a miss.

        Raises:
            CacheError: The database can't be asked.
        """
        found: dict[str, CacheEntry] = {}
        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
            wanted = _is_among(connection, cache_entries.c.fingerprint, fingerprints)
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

        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
            query = _newest_of_each(
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
        with database_errors(), self.engine.begin() as connection:
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
        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
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
        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
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
        with database_errors():
            with self.engine.connect().execution_options(reads_only=True) as connection:
                query = sa.select(contents.c.digest).where(
                    _is_among(connection, contents.c.digest, items)
                )
                known = set(connection.execute(query).scalars())
            rows = [
                {"digest": digest, "content": content}
                for digest, content in items.items()
                if digest not in known
            ]
            if rows:
                with self.engine.begin() as connection:
                    upsert(connection, contents, rows, update=False)

    def get_contents(self, digests: Collection[str]) -> dict[str, Any]:
        """Return the contents that are kept under these digests, and can be read."""
        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
            wanted = _is_among(connection, contents.c.digest, digests)
            rows = connection.execute(sa.select(contents).where(wanted)).all()
        return {row.digest: row.content for row in rows if isinstance(row.content, dict)}

    # ---- plans -----------------------------------------------------------------------------

    def put_plan(self, dag_id: str, run_id: str, task_id: str, plan: Mapping[str, Any]) -> None:
        """Keep the plan that a task made for its run; it replaces an earlier one of that task."""
        row = {"dag_id": dag_id, "run_id": run_id, "task_id": task_id, "plan": dict(plan)}
        with database_errors(), self.engine.begin() as connection:
            upsert(connection, plans, [row], update=True)

    def find_plan(self, dag_id: str, run_id: str, task_id: str) -> dict[str, Any] | None:
        """Return the plan that a task made for its run, in its JSON form, or None."""
        query = sa.select(plans.c.plan).where(
            plans.c.dag_id == dag_id, plans.c.run_id == run_id, plans.c.task_id == task_id
        )
        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
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
        with database_errors(), self.engine.begin() as connection:
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
        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
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

        with (
            database_errors(),
            self.engine.connect().execution_options(reads_only=True) as connection,
        ):
            query = _newest_of_each(
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


class database_errors:  # noqa: N801 - used as a statement: `with database_errors(), …`
    """Turns errors of the database into ours, without the statement's values."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DBAPIError):
            raise CacheError(f"the metadata database failed: {error.orig}") from error


def upsert(
    connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]], *, update: bool
) -> None:
    """Insert rows; one that is there already is replaced, or, without ``update``, left as it is."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    keys = [column.name for column in table.primary_key]
    for chunk in _chunks(rows):
        statement = insert(table).values(chunk)
        if update:
            changed = {
                column.name: statement.excluded[column.name]
                for column in table.columns
                if column.name not in keys
            }
            connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))
        else:
            connection.execute(statement.on_conflict_do_nothing(index_elements=keys))


def _is_among(
    connection: Connection, column: sa.Column[Any], values: Collection[str]
) -> sa.ColumnElement[bool]:
    """Return the condition that a column has one of these values, however many."""
    if connection.dialect.name == "postgresql":  # knows how many, and so that its index pays
        return column == sa.any_(sa.literal(list(values), sa.ARRAY(sa.Text)))
    return column.in_(_each(connection, values))


def _each(connection: Connection, values: Collection[str]) -> sa.Select[tuple[str]]:
    """Return a query for these values, however many: they travel as one parameter, as JSON."""
    text = sa.literal(json.dumps(list(values)))
    if connection.dialect.name == "postgresql":
        each = sa.func.json_array_elements_text(sa.cast(text, sa.JSON)).table_valued("value")
    else:
        each = sa.func.json_each(text).table_valued("value")
    return sa.select(sa.cast(each.c.value, sa.Text).label("value"))


def _newest_of_each(
    connection: Connection,
    table: sa.Table,
    steps: Collection[str],
    *,
    order: str,
    count: int,
    where: Callable[[_Row], sa.ColumnElement[bool]],
) -> sa.Select[Any]:
    """Return a query for the newest rows of each step, newest first, that looks at few others.

    Args:
        connection: Where it is going to be asked.
        table: It has a column ``step``.
        steps: The steps.
        order: The column that says which row is newer.
        count: How many rows of each step.
        where: Which rows are looked for.
    """
    wanted = _each(connection, steps).subquery("wanted")
    (key,) = table.primary_key
    row = table.alias("candidate")
    newest = (
        sa.select(row.c[key.name])
        .where(row.c.step == wanted.c.value, where(row))
        .order_by(row.c[order].desc())
        .limit(count)
        .correlate(wanted)
    )
    if connection.dialect.name == "postgresql":
        found = newest.lateral("newest")
        joined = wanted.join(found, sa.true()).join(table, key == found.c[key.name])
    else:  # SQLite has no LATERAL, but looks up the keys of a subquery one by one
        joined = wanted.join(table, key.in_(newest.scalar_subquery()))
    return sa.select(table).select_from(joined).order_by(table.c[order].desc())


def _chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]


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
