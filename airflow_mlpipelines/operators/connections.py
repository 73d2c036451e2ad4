"""What Airflow knows and a step needs: the metadata database, the datastores, secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines import settings
from airflow_mlpipelines.definition.resources import parse_size
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.credentials import make_arguments
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import Store, StoreSet, open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Connection

    from airflow_mlpipelines.definition.graph import DatastoreSpec, PipelineGraph


def metadata_url() -> str:
    """Return the SQLAlchemy URL of the metadata database.

    That of the Airflow connection which ``[mlpipelines] metadata_conn_id`` names; where it names none,
    SQLite below ``$AIRFLOW_HOME``. Runs in task, triggerer, api-server and command-line processes.

    Raises:
        DataError: The connection does not exist, or is to no database that can be used.
    """
    from airflow.sdk.configuration import conf

    conn_id = conf.get(settings.CONFIG_SECTION, settings.METADATA_OPTION, fallback="")
    # Without a name nothing is asked: a look-up costs every step a request, and a secrets backend.
    if not conn_id:
        return settings.default_metadata_url()
    connection = _find_connection(conn_id)
    if connection is None:
        raise DataError(
            f"[{settings.CONFIG_SECTION}] {settings.METADATA_OPTION} names the Airflow connection "
            f"{conn_id!r}, which does not exist. "
            f"Add it with `airflow connections add {conn_id} --conn-uri postgres://…`."
        )
    return _sqlalchemy_url(conn_id, connection)


def open_stores(graph: PipelineGraph) -> StoreSet:
    """Return the pipeline's datastores, opened with the credentials of their Airflow connections.

    Raises:
        DataError: A connection that a datastore names does not exist.
    """
    stores = [open_datastore(spec) for spec in graph.datastores.values()]
    return StoreSet(stores, default=graph.default_datastore)


def open_datastore(spec: DatastoreSpec) -> Store:
    """Return a datastore, opened with the credentials of its Airflow connection if it names one.

    Raises:
        DataError: That connection does not exist.
    """
    credentials: Mapping[str, Any] = {}
    if spec.conn_id is not None:
        credentials = _credentials(spec.name, spec.url, spec.conn_id)
    return open_store(spec.name, spec.url, options=spec.options, credentials=credentials)


def open_blobs() -> BlobCache:
    """Return this machine's cache of data from remote datastores, with the size that is configured.

    Raises:
        DefinitionError: ``[mlpipelines] blob_cache_size`` is no size.
    """
    from airflow.sdk.configuration import conf

    option = settings.BLOB_CACHE_OPTION
    size = conf.get(settings.CONFIG_SECTION, option, fallback="") or None
    limit = parse_size(f"[{settings.CONFIG_SECTION}] {option}", size)
    return BlobCache(settings.blob_cache_directory(), limit=limit)


def read_secrets(step: str, secrets: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables with the passwords of the Airflow connections that they name.

    Raises:
        DataError: A connection does not exist, or has no password.
    """
    values = {}
    for variable, conn_id in secrets.items():
        connection = _find_connection(conn_id)
        if connection is None or not connection.password:
            raise DataError(
                f"step {step!r}: the secret {variable!r} is to come from the password of the Airflow "
                f"connection {conn_id!r}, which does not exist or has none. "
                f"Add it with `airflow connections add {conn_id} --conn-type generic --conn-password …`."
            )
        values[variable] = connection.password
    return values


def _find_connection(conn_id: str) -> Connection | None:
    from airflow.sdk import Connection
    from airflow.sdk.exceptions import AirflowNotFoundException, AirflowRuntimeError

    try:
        found: Connection = Connection.get(conn_id)
    except (AirflowNotFoundException, AirflowRuntimeError):
        return None
    return found


def _sqlalchemy_url(conn_id: str, connection: Connection) -> str:
    """Return the connection as SQLAlchemy wants it, whose schemes are not Airflow's types."""
    extra: dict[str, Any] = connection.extra_dejson
    if "url" in extra:
        return str(extra["url"])
    from sqlalchemy.engine import URL

    drivers = {"postgres": "postgresql", "postgresql": "postgresql", "sqlite": "sqlite"}
    driver = drivers.get(connection.conn_type or "")
    if driver is None:
        raise DataError(
            f"the Airflow connection {conn_id!r} is of type {connection.conn_type!r}; the metadata database can be {sorted(set(drivers.values()))}."
        )
    if driver == "sqlite":
        return f"sqlite:///{connection.host or connection.schema}"
    return URL.create(
        driver,
        username=connection.login,
        password=connection.password,
        host=connection.host,
        port=connection.port,
        database=connection.schema,
    ).render_as_string(hide_password=False)


def _credentials(datastore: str, url: str, conn_id: str) -> dict[str, Any]:
    """Return the arguments for the fsspec filesystem that a connection stands for."""
    connection = _find_connection(conn_id)
    if connection is None:
        raise DataError(
            f"datastore {datastore!r} names the Airflow connection {conn_id!r}, which does not exist. "
            f"Add it with `airflow connections add {conn_id} …`, or correct the workspace file."
        )
    return make_arguments(datastore, url, connection)
