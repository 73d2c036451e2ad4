"""The metadata database opened: an engine whose tables are of this release."""

from __future__ import annotations

import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from airflow_mlpipelines.exceptions import CacheError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection

VERSION_TABLE = "mlp_alembic_version"
HEAD = "0001"
"""The newest migration, so that a process that finds it in the database need not import Alembic."""
_KNOWN = (HEAD,)
_BUSY_SECONDS = 30
_ADVISORY_LOCK = 0x6D6C7069


@lru_cache(maxsize=8)
def open_engine(url: str) -> Engine:
    """Return an engine on the database, migrated to this release if it was older.

    Many processes may call this at once on an empty database: one migrates, the others wait.

    Raises:
        CacheError: The database can't be reached, or a newer release has migrated it.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = _open_sqlite(parsed)
    else:
        engine = sa.create_engine(parsed, pool_pre_ping=True, pool_size=2, max_overflow=4)
    try:
        if _find_version(engine) != HEAD:
            _migrate(engine)
    except DBAPIError as error:
        raise CacheError(
            f"the metadata database {parsed.render_as_string(hide_password=True)} can't be used: "
            f"{error.orig}. It is named by the Airflow connection 'mlpipelines_metadata'."
        ) from error
    return engine


def _open_sqlite(url: sa.URL) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: DBAPIConnection, _record: Any) -> None:
        # Transactions are begun by us, as writers: two readers that both want to write would deadlock.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads_only", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


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
    from alembic import command
    from alembic.config import Config
    from filelock import FileLock

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    name = hashlib.sha256(str(engine.url).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir(), f"mlpipelines-migrate-{name}.lock"))
    with lock, engine.connect() as connection:
        if engine.dialect.name == "postgresql":  # other machines may be migrating, too
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        version = _find_version(engine)
        if version == HEAD:
            return
        if version is not None and version not in _KNOWN:
            raise CacheError(
                f"the metadata database is at version {version!r}, which a newer release of "
                f"airflow_mlpipelines made; this one knows {HEAD!r}. Upgrade it on this machine."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)
        connection.commit()
