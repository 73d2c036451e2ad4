"""Alembic migrations of the metadata database; run by :mod:`airflow_mlpipelines.caching.schema`."""

from __future__ import annotations
