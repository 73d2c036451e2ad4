"""From Airflow's connections to the arguments of fsspec's filesystems: one function per kind of store.

``extra`` may hold any argument of the filesystem by fsspec's own name. What Airflow's own connection
types have under other names is understood as well.
"""

from __future__ import annotations

import json
from base64 import b64encode
from contextlib import suppress
from io import StringIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow_mlpipelines._protocols import scheme_of
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.aws_connections import make_s3_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk import Connection

    Make = Callable[[Connection, dict[str, Any], str], dict[str, Any]]


def make_arguments(datastore: str, url: str, connection: Connection) -> dict[str, Any]:
    """Return the arguments for the filesystem of a datastore that a connection stands for.

    Args:
        datastore: The datastore's name, for errors.
        url: Its URL.
        connection: An Airflow connection.

    Raises:
        DataError: Something in the connection can't be understood.
    """
    scheme = scheme_of(url)
    # Airflow's older forms put the connection's type before the names of its fields.
    extra = {
        name.removeprefix(f"extra__{connection.conn_type}__"): value
        for name, value in connection.extra_dejson.items()
        if value not in (None, "")
    }
    make = _MAKERS.get(scheme)
    if make is None:
        return extra
    try:
        made = make(connection, extra, url)
    except DataError as error:
        where = f"datastore {datastore!r}: the Airflow connection {connection.conn_id!r}"
        raise DataError(f"{where} {error}", retryable=False) from None
    except (ValueError, TypeError, AttributeError) as error:
        # The value itself is not shown: it may be a key.
        raise DataError(
            f"datastore {datastore!r}: a field of the Airflow connection {connection.conn_id!r} can't be "
            f"read ({type(error).__name__}). Check its keys and its extra, as {scheme}:// needs them."
        ) from None
    return {name: value for name, value in made.items() if value not in (None, "")}


def _gcs(connection: Connection, extra: dict[str, Any], url: str) -> dict[str, Any]:
    """Type ``google_cloud_platform``: a key as JSON or as a file, or nobody's rights."""
    del connection, url
    key, path = extra.pop("keyfile_dict", None), extra.pop("key_path", None)
    token = json.loads(key) if isinstance(key, str) else key or path
    if _is_on(extra.pop("is_anonymous", False)):
        token = "anon"  # noqa: S105 - gcsfs' word for none
    for name in ("scope", "num_retries", "key_secret_name", "key_secret_project_id"):
        extra.pop(name, None)
    return {"token": token, **extra}


def _azure(connection: Connection, extra: dict[str, Any], url: str) -> dict[str, Any]:
    """Types ``wasb``, ``azure_data_lake`` and ``adls``: account and key, or an application with its secret."""
    del url
    tenant = extra.pop("tenant_id", None) or extra.pop("tenant", None)
    key = extra.pop("shared_access_key", None)
    host = connection.host or ""
    parts = urlsplit(host if "://" in host else f"//{host}")
    account = extra.pop("account_name", None)
    made: dict[str, Any] = {"account_key": key}
    if tenant:
        account = account or (parts.hostname or "").partition(".")[0]
        made = {
            "tenant_id": tenant,
            "client_id": connection.login,
            "client_secret": connection.password,
        }
    else:
        account = account or connection.login or (parts.hostname or "").partition(".")[0]
        made["account_key"] = key or connection.password
    if "." in (parts.hostname or "") and not (parts.hostname or "").endswith(".windows.net"):
        made["account_host"] = parts.netloc
    return {"account_name": account, **made, **extra}


def _sftp(connection: Connection, extra: dict[str, Any], url: str) -> dict[str, Any]:
    """Types ``sftp`` and ``ssh``: a password or a private key; the server's key, where it is given."""
    made: dict[str, Any] = {
        "username": connection.login,
        "password": connection.password,
        "port": connection.port,
        "key_filename": extra.pop("key_file", None),
        "passphrase": extra.pop("private_key_passphrase", None),
        "timeout": extra.pop("conn_timeout", extra.pop("timeout", None)),
    }
    if not urlsplit(url).hostname:
        made["host"] = connection.host
    key = extra.pop("private_key", None)
    if key is not None:
        made["pkey"] = _read_key(key, made.pop("passphrase"))
    host_key = extra.pop("host_key", None)
    check = not _is_on(extra.pop("no_host_key_check", True))
    if host_key is not None or check:
        made["host_key_policy"] = _check_host_key(host_key)
    return {**made, **extra}


def _read_key(text: str, passphrase: str | None) -> Any:
    """Return a private key, of whatever kind it is."""
    from paramiko import ECDSAKey, Ed25519Key, RSAKey, SSHException

    for kind in (Ed25519Key, ECDSAKey, RSAKey):
        with suppress(SSHException, ValueError, IndexError):
            return kind.from_private_key(StringIO(text), password=passphrase)
    raise ValueError


def _check_host_key(wanted: str | None) -> Any:
    """Return what accepts the server's key if it is ``wanted``; None is one of ``~/.ssh/known_hosts``."""
    from pathlib import Path

    from paramiko import HostKeys, MissingHostKeyPolicy, SSHException

    class Check(MissingHostKeyPolicy):  # type: ignore[misc]
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            del client
            file = Path("~/.ssh/known_hosts").expanduser()
            if wanted is not None:
                known = wanted.split()[-1] == key.get_base64()
            else:
                known = file.is_file() and HostKeys(str(file)).check(hostname, key)
            if not known:
                raise SSHException(f"the server {hostname} shows a key that is not known")

    return Check()


def _hdfs(connection: Connection, extra: dict[str, Any], url: str) -> dict[str, Any]:
    """Types ``hdfs`` and ``webhdfs``: the user, and the name node where the URL names none."""
    made: dict[str, Any] = {"user": connection.login}
    if not urlsplit(url).hostname:
        made |= {"host": connection.host, "port": connection.port}
    return {**made, **extra}


def _webhdfs(connection: Connection, extra: dict[str, Any], url: str) -> dict[str, Any]:
    """Type ``webhdfs``: besides, a password, and HTTPS."""
    use_ssl = _is_on(extra.pop("use_ssl", False))
    made = {"password": connection.password, "use_https": use_ssl or None}
    return {**_hdfs(connection, extra, url), **_given(made)}


def _http(connection: Connection, extra: dict[str, Any], url: str) -> dict[str, Any]:
    """Type ``http``: login and password for Basic authentication, and headers."""
    del url
    client = dict(extra.pop("client_kwargs", {}))
    headers = dict(extra.pop("headers", {}))
    if connection.login:
        pair = f"{connection.login}:{connection.password or ''}"
        headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
    if headers:
        client["headers"] = {**headers, **client.get("headers", {})}
    return {"client_kwargs": client or None, **extra}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}


def _is_on(value: object) -> bool:
    return str(value).strip().lower() in ("1", "true", "yes", "on")


_MAKERS: dict[str, Make] = {
    "s3": make_s3_arguments,
    "s3a": make_s3_arguments,
    "gs": _gcs,
    "gcs": _gcs,
    "abfs": _azure,
    "abfss": _azure,
    "az": _azure,
    "hdfs": _hdfs,
    "webhdfs": _webhdfs,
    "sftp": _sftp,
    "ssh": _sftp,
    "http": _http,
    "https": _http,
}
