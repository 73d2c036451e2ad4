"""The metadata index on a real PostgreSQL server."""

from __future__ import annotations

import itertools

import pytest
import sqlalchemy as sa

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.exceptions import CacheError
from tests.integration.postgres_server import run_postgres
from tests.unit.caching.index_contract import IndexContract, forget_engines

pytestmark = pytest.mark.postgres

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("psycopg2")
    with run_postgres() as url:
        yield url


@pytest.fixture(scope="module")
def admin(server):
    """An engine on the server that is not the code's own."""
    return sa.create_engine(
        (server % "postgres").replace("postgresql:", "postgresql+psycopg2:"),
        isolation_level="AUTOCOMMIT",
        poolclass=sa.NullPool,
    )


@pytest.fixture
def url(server, admin):
    """The URL of a database of the test's own, with nothing in it."""
    name = f"metadata_{next(_numbers)}"
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield server % name
    forget_engines()


class TestPostgresIndex(IndexContract):
    """Everything that an index promises."""

    race_processes = 6
    race_rounds = 100


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_every_spelling_of_the_scheme_is_understood(url, scheme):
    address = url.partition("://")[2]

    assert MetadataIndex(f"{scheme}://{address}").find_entries(["a"]) == {}


def test_a_connection_that_the_server_dropped_is_opened_again(url, admin):
    index = MetadataIndex(url)
    index.find_entries(["a"])
    with admin.connect() as connection:
        dropped = connection.execute(
            sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
            {"name": url.rpartition("/")[2]},
        ).all()
    assert dropped

    assert index.find_entries(["a"]) == {}


def test_a_database_that_is_not_there_is_named_without_its_password(server):
    url = (server % "nowhere").replace("mlpipelines@", "mlpipelines:pa55w0rd@")

    with pytest.raises(
        CacheError, match=r'nowhere can\'t be used: .*"nowhere" does not exist'
    ) as caught:
        MetadataIndex(url).find_entries(["a"])
    assert "pa55w0rd" not in str(caught.value)


def test_lookups_use_the_indexes(url):
    index = MetadataIndex(url)
    engine = index.engine
    with engine.begin() as connection:
        for table, key in (("mlp_step_runs", ""), ("mlp_cache_entries", "fingerprint, ")):
            columns = (
                "dag_id, run_id, task_id, map_index, try_number, pipeline, step, step_run, state, "
                "reason, ingredients, outputs, metrics, seconds, seconds_saved, finished_at"
                if not key
                else "pipeline, step, step_type, outputs, ingredients, seconds, writer, step_run, "
                "created_at"
            )
            values = (
                "'d', 'r', 't', -1, 1, 'p', 's' || n % 100, 'x', 'ran', '', '{}', '{}', '{}', 0, 0, n"
                if not key
                else "'p', 's' || n % 100, 't', '{}', '{}', 0, 'w', 'x', n"
            )
            number = "lpad(n::text, 64, '0'), " if key else ""
            connection.execute(
                sa.text(
                    f"INSERT INTO {table} ({key}{columns}) "
                    f"SELECT {number}{values} FROM generate_series(1, 20000) n"
                )
            )
        connection.execute(sa.text("ANALYZE"))
    plans: list[str] = []

    def explain(connection, _cursor, statement, parameters, *_):
        if statement.startswith("SELECT"):
            cursor = connection.connection.cursor()
            cursor.execute(f"EXPLAIN {statement}", parameters)
            plans.append("\n".join(row[0] for row in cursor.fetchall()))

    sa.event.listen(engine, "before_cursor_execute", explain)
    index.find_entries(["0" * 63 + "1"])
    index.find_newest_entries("p", ["s1", "s2"])
    index.find_earlier_runs("p", ["s1", "s2"])

    assert len(plans) == 3
    for plan in plans:
        assert "Seq Scan" not in plan, plan
