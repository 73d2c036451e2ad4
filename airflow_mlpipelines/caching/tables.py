"""The tables of the metadata database. A change here needs a migration in ``migrations/versions``."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

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
    Column("pipeline", String(250), nullable=False),
    Column("step", String(250), nullable=False),
    Column("step_type", String(250), nullable=False),
    Column("outputs", JSON, nullable=False),
    Column("ingredients", JSON, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("writer", String(250), nullable=False),
    Column("step_run", String(64), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Index(None, "pipeline", "step", "created_at"),
)
"""What each fingerprint was found to make."""

contents = Table(
    "mlp_contents",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("content", JSON, nullable=False),
)
"""Ingredients that many entries share, by digest: files of code, packages of environments."""

leases = Table(
    "mlp_leases",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("holder", String(750), nullable=False),
    Column("token", String(32), nullable=False),
    Column("acquired_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)
"""Who is making what right now. Times are seconds since 1970 by the database's clock."""

step_runs = Table(
    "mlp_step_runs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("dag_id", String(250), nullable=False),
    Column("run_id", String(250), nullable=False),
    Column("task_id", String(250), nullable=False),
    Column("map_index", Integer, nullable=False),
    Column("try_number", Integer, nullable=False),
    Column("pipeline", String(250), nullable=False),
    Column("step", String(250), nullable=False),
    Column("step_run", String(64), nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("fingerprint", String(64), nullable=True),
    Column("ingredients", JSON, nullable=True),
    Column("outputs", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("seconds_saved", Float, nullable=False),
    Column("finished_at", DateTime(timezone=True), nullable=False),
    Index(None, "dag_id", "run_id"),
    Index(None, "pipeline", "step", "id"),
)
"""What happened: one row for every time that a step ran, was reused or failed."""
