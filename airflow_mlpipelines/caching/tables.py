"""The tables of the metadata database. A change here needs a migration in ``migrations/versions``."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Float, Index, Integer, MetaData, String, Table, Text
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect


class JsonText(TypeDecorator[Any]):
    """JSON, kept as text: a loss that is NaN is JSON to Python, but not to PostgreSQL.

    What was damaged is read as None, so that one bad row does not spoil a whole query.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, _dialect: Dialect) -> str | None:
        """Return the text to keep."""
        return json.dumps(value, separators=(",", ":")) if value is not None else None

    def process_result_value(self, value: Any, _dialect: Dialect) -> Any:
        """Return the value that was kept."""
        try:
            return json.loads(value) if value is not None else None
        except (ValueError, TypeError, RecursionError):
            return None


class UtcTime(TypeDecorator[datetime]):
    """A moment, kept as seconds since 1970: SQLite has no type for it that knows time zones."""

    impl = Float
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> float | None:
        """Return the number to keep."""
        return value.timestamp() if value is not None else None

    def process_result_value(self, value: Any, _dialect: Dialect) -> datetime | None:
        """Return the moment, or None if it was damaged."""
        try:
            return datetime.fromtimestamp(value, UTC)
        except (TypeError, ValueError, OverflowError, OSError):
            return None


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

cache_entries = Table(
    "mlp_cache_entries",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("pipeline", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("step_type", Text, nullable=False),
    Column("outputs", JsonText, nullable=False),
    Column("ingredients", JsonText, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("writer", Text, nullable=False),
    Column("step_run", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "pipeline", "step", "created_at"),
)
"""What each fingerprint was found to make."""

contents = Table(
    "mlp_contents",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("content", JsonText, nullable=False),
)
"""Ingredients that many entries share, by digest: files of code, packages of environments."""

launches = Table(
    "mlp_launches",
    metadata,
    Column("step_run", String(64), primary_key=True),
    Column("word", String(32), nullable=False),
    Column("dag_id", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("task_id", Text, nullable=False),
    Column("map_index", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("nodes", Integer, nullable=False),
    Column("site", JsonText, nullable=False),
    Column("noted_at", Float, nullable=False),
)
"""What was launched on clusters, until it is removed. The time is seconds since 1970 by the database's clock."""

leases = Table(
    "mlp_leases",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("holder", Text, nullable=False),
    Column("token", String(32), nullable=False),
    Column("renewed_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)
"""Who is making what right now. Times are seconds since 1970 by the database's clock."""

plans = Table(
    "mlp_plans",
    metadata,
    Column("dag_id", Text, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("task_id", Text, primary_key=True),
    Column("plan", JsonText, nullable=False),
)
"""What each run decided when it started; the task is the one that decided."""

step_runs = Table(
    "mlp_step_runs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("dag_id", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("task_id", Text, nullable=False),
    Column("map_index", Integer, nullable=False),
    Column("try_number", Integer, nullable=False),
    Column("pipeline", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("step_run", String(64), nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("fingerprint", String(64), nullable=True),
    Column("ingredients", JsonText, nullable=True),
    Column("outputs", JsonText, nullable=False),
    Column("metrics", JsonText, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("seconds_saved", Float, nullable=False),
    Column("finished_at", UtcTime, nullable=False),
    Index(None, "dag_id", "run_id"),
    Index(None, "pipeline", "step", "id"),
)
"""What happened: one row for every time that a step ran, was reused or failed."""
