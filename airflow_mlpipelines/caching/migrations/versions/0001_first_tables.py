"""The first tables: cache entries, contents, leases, step runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "mlp_cache_entries",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("pipeline", sa.Text, nullable=False),
        sa.Column("step", sa.Text, nullable=False),
        sa.Column("step_type", sa.Text, nullable=False),
        sa.Column("outputs", sa.Text, nullable=False),
        sa.Column("ingredients", sa.Text, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("writer", sa.Text, nullable=False),
        sa.Column("step_run", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index(
        "ix_mlp_cache_entries_pipeline_step_created_at",
        "mlp_cache_entries",
        ["pipeline", "step", "created_at"],
    )
    op.create_table(
        "mlp_contents",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("content", sa.Text, nullable=False),
    )
    op.create_table(
        "mlp_leases",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("token", sa.String(32), nullable=False),
        sa.Column("renewed_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_table(
        "mlp_step_runs",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("dag_id", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("task_id", sa.Text, nullable=False),
        sa.Column("map_index", sa.Integer, nullable=False),
        sa.Column("try_number", sa.Integer, nullable=False),
        sa.Column("pipeline", sa.Text, nullable=False),
        sa.Column("step", sa.Text, nullable=False),
        sa.Column("step_run", sa.String(64), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=True),
        sa.Column("ingredients", sa.Text, nullable=True),
        sa.Column("outputs", sa.Text, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("seconds_saved", sa.Float, nullable=False),
        sa.Column("finished_at", sa.Float, nullable=False),
    )
    op.create_index("ix_mlp_step_runs_dag_id_run_id", "mlp_step_runs", ["dag_id", "run_id"])
    op.create_index(
        "ix_mlp_step_runs_pipeline_step_id", "mlp_step_runs", ["pipeline", "step", "id"]
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("mlp_step_runs", "mlp_leases", "mlp_contents", "mlp_cache_entries"):
        op.drop_table(table)
