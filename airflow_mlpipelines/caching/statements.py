"""Statements that SQLite and PostgreSQL need in different words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from sqlalchemy.engine import Connection

    Rows = sa.FromClause


def seconds_now(connection: Connection) -> sa.ColumnElement[float]:
    """Return an expression for seconds since 1970 by the database's clock, one value in a statement."""
    if connection.dialect.name == "postgresql":
        return sa.literal_column("extract(epoch FROM statement_timestamp())::float8", sa.Float)
    return sa.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sa.Float)


def upsert(
    connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]], *, update: bool
) -> None:
    """Insert rows; one that is there already is replaced, or, without ``update``, left as it is."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    keys = [column.name for column in table.primary_key]
    statement = insert(table)
    if update:
        changed = {
            column.name: statement.excluded[column.name]
            for column in table.columns
            if column.name not in keys
        }
        statement = statement.on_conflict_do_update(index_elements=keys, set_=changed)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    connection.execute(statement, rows)


def is_among(
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


def newest_of_each(
    connection: Connection,
    table: sa.Table,
    steps: Collection[str],
    *,
    order: str,
    count: int,
    where: Callable[[Rows], sa.ColumnElement[bool]],
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
