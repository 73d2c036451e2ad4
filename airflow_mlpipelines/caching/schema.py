"""The metadata database opened: an engine whose tables are of this release."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError, SQLAlchemyError

from airflow_mlpipelines import settings
from airflow_mlpipelines.exceptions import CacheError

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor

VERSION_TABLE = "mlp_alembic_version"
HEAD = "0003"
"""The newest migration, so that a process that finds it in the database need not import Alembic."""
_KNOWN = ("0001", "0002", HEAD)
_DRIVERS = {"postgres": "postgresql+psycopg2", "postgresql": "postgresql+psycopg2"}
"""The driver of the extra 'postgres': which one SQLAlchemy takes by itself changes with its releases."""
_BUSY_SECONDS = 30
_ADVISORY_LOCK = 0x6D6C7069
_KEPT_ENGINES = 8
_NAMED_BY = f"[{settings.CONFIG_SECTION}] {settings.METADATA_OPTION} in Airflow's configuration"

_engines: dict[str, Engine] = {}
_opening = threading.Lock()
_inherited: list[object] = []


class database_errors:  # noqa: N801 - used as a statement: `with database_errors(), …`
    """Turns errors of the database into ours, without the statement's values."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DBAPIError):
            raise CacheError(f"the metadata database failed: {error.orig}") from error


def open_engine(url: str) -> Engine:
    """Return an engine on the database, migrated to this release if it was older.

    Many processes may call this at once on an empty database: one migrates, the others wait. A process
    has one engine for a database, and so has each process forked from it.

    Raises:
        CacheError: The database can't be reached, or a newer release has migrated it.
    """
    with _opening:
        engine = _engines.get(url)
        if engine is None:
            engine = _open(url)
            while len(_engines) >= _KEPT_ENGINES:
                _engines.pop(next(iter(_engines))).dispose()
            _engines[url] = engine
        return engine


def _open(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
        parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
        if parsed.get_backend_name() == "sqlite":
            engine = _make_sqlite_engine(parsed)
        else:
            engine = sa.create_engine(parsed, pool_pre_ping=True, pool_size=2, max_overflow=4)
    except (SQLAlchemyError, ImportError) as error:
        raise CacheError(
            f"the metadata database's address can't be used: {type(error).__name__}. Let {_NAMED_BY} "
            "name SQLite, or PostgreSQL with the extra 'postgres'."
        ) from error
    try:
        if _find_version(engine) != HEAD:
            _migrate(engine)
    except (DBAPIError, OSError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise CacheError(
            f"the metadata database {parsed.render_as_string(hide_password=True)} can't be used: "
            f"{cause}. It is named by {_NAMED_BY}."
        ) from error
    return engine


def _make_sqlite_engine(url: sa.URL) -> Engine:
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS})

    @sa.event.listens_for(engine, "do_connect")
    def make_room(*_: object) -> None:
        if url.database and url.database != ":memory:":
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: DBAPIConnection, _record: Any) -> None:
        # Transactions are begun by us, as writers: two readers that both want to write would deadlock.
        connection.isolation_level = None
        cursor = connection.cursor()
        _switch_to_wal(cursor)
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads_only", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _switch_to_wal(cursor: DBAPICursor) -> None:
    """Let readers and a writer work at once. On a new file, SQLite won't wait for another who does so."""
    import sqlite3

    patience = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > patience:
                raise
            time.sleep(0.01)
        else:
            return


def _find_version(engine: Engine) -> str | None:
    """Return the migration that the database is at, or None if it has none of our tables."""
    try:
        with engine.connect().execution_options(reads_only=True) as connection:
            return connection.execute(
                sa.text(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608 - a constant
            ).scalar()
    except (OperationalError, ProgrammingError):
        return None


def _migrate(engine: Engine) -> None:
    """Bring the database to this release, in one transaction that nobody else has at the same time.

    SQLite's transaction is the lock, as all of ours are begun as writers; PostgreSQL has one for it.
    """
    from alembic import command

    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        version = _find_version(engine)  # somebody else may have been quicker
        if version == HEAD:
            return
        if version is not None and version not in _KNOWN:
            raise CacheError(
                f"the metadata database is at version {version!r}, which a newer release of "
                f"airflow_mlpipelines made; this one knows {HEAD!r}. Upgrade it on this machine."
            )
        command.upgrade(make_alembic_config(connection), HEAD)


def make_alembic_config(connection: Connection) -> Config:
    """Return the configuration with which Alembic migrates over this connection."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    return config


def _leave_connections_to_the_parent() -> None:
    """In a forked process: open connections of its own, and don't close those of the parent."""
    global _opening  # noqa: PLW0603 - a thread of the parent may hold it, and is not here
    _opening = threading.Lock()
    for engine in _engines.values():
        _inherited.append(engine.pool)  # else they would be closed when they are collected
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_leave_connections_to_the_parent)
