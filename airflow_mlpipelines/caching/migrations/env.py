"""Alembic's environment: migrates over the connection that it is handed."""

from __future__ import annotations

from alembic import context

from airflow_mlpipelines.caching.schema import VERSION_TABLE
from airflow_mlpipelines.caching.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite can't alter a table in place
)
with context.begin_transaction():
    context.run_migrations()
