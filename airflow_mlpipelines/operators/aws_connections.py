"""From Airflow's ``aws`` connections to the arguments of an S3 datastore, as the Amazon provider reads them."""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import suggest
from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.s3_roles import ROLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Connection

_UNDERSTOOD = (
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "region_name",
    "endpoint_url",
    "verify",
    "profile_name",
    "session_kwargs",
    "config_kwargs",
    "service_config",
    "role_arn",
    "assume_role_method",
    "assume_role_kwargs",
    "external_id",
    "assume_role_with_web_identity_federation",
    "assume_role_with_web_identity_token_file",
)
"""Of Airflow's own. Besides, there are those of the s3fs filesystem."""
_SESSION = (
    "profile_name",
    "region_name",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
)
_METHODS = ("assume_role", "assume_role_with_web_identity")
_NOT_ARGUMENTS = {"self", "kwargs", "session", "loop", "asynchronous"}
_OF_FSSPEC = {"profile", "use_listings_cache", "listings_expiry_time", "max_paths"}
_SHOWN = 40
_LONGEST_NAME = 64
_NOT_IN_NAMES = re.compile(r"[^\w+=,.@-]+", re.ASCII)


def make_s3_arguments(connection: Connection, extra: dict[str, Any], url: str) -> dict[str, Any]:
    """Return the arguments for the filesystem: login and password are the key pair, the rest is in ``extra``.

    Raises:
        DataError: ``extra`` has something that is not understood; nothing of it is left out in silence.
        ValueError: A value is none of its kind.
    """
    del url
    config = _mapping(extra.pop("config_kwargs", {}))
    services = _mapping(extra.pop("service_config", {}))
    session = _mapping(extra.pop("session_kwargs", {}))
    _check_known("session_kwargs", session, _SESSION)
    given = {name: extra.pop(name, None) or session.get(name) for name in _SESSION}
    client = {
        **_mapping(extra.pop("client_kwargs", {})),
        **_given(region_name=given["region_name"], endpoint_url=extra.pop("endpoint_url", None)),
        **_given(endpoint_url=_mapping(services.get("s3", {})).get("endpoint_url")),
    }
    verify = extra.pop("verify", None)
    if verify is not None:
        client["verify"] = _read_verify(verify)
    made: dict[str, Any] = {
        "key": connection.login or given["aws_access_key_id"],
        "secret": connection.password or given["aws_secret_access_key"],
        "token": given["aws_session_token"],
        "profile": given["profile_name"],
    }
    if config.get("signature_version") == "unsigned":  # the provider's word for nobody's rights
        del config["signature_version"]
        made["anon"] = True
    made |= {"client_kwargs": client or None, "config_kwargs": config or None}
    made[ROLE] = _read_role(connection, extra, _mapping(services.get("sts", {})))
    known = _driver_arguments()
    if known:
        _check_known("extra", extra, (*_UNDERSTOOD, *known), shown=_UNDERSTOOD)
    return {**extra, **_given(**made)}


def _read_role(
    connection: Connection, extra: dict[str, Any], sts: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the role to take on, as :mod:`~airflow_mlpipelines.storage.s3_roles` wants it; None without one."""
    arn = extra.pop("role_arn", None)
    method = extra.pop("assume_role_method", None) or _METHODS[0]
    arguments = _mapping(extra.pop("assume_role_kwargs", {}))
    external_id = extra.pop("external_id", None)
    federation = extra.pop("assume_role_with_web_identity_federation", None)
    token_file = extra.pop("assume_role_with_web_identity_token_file", None)
    if arn is None:
        return None
    if method not in _METHODS:
        raise DataError(
            f"has the assume_role_method {str(method)[:_SHOWN]!r}, and for S3 there are {list(_METHODS)}."
        )
    if method == _METHODS[0]:
        token_file = None
    elif federation != "file" or token_file is None:
        raise DataError(
            "has the assume_role_method 'assume_role_with_web_identity', which needs "
            "assume_role_with_web_identity_federation 'file' and assume_role_with_web_identity_token_file."
        )
    if external_id is not None:
        arguments.setdefault("ExternalId", external_id)
    name = _NOT_IN_NAMES.sub("-", f"Airflow_{connection.conn_id}")[:_LONGEST_NAME]
    arguments.setdefault("RoleSessionName", name)
    return _given(
        arguments={"RoleArn": arn, **arguments},
        endpoint_url=sts.get("endpoint_url"),
        token_file=token_file,
    )


def _read_verify(value: object) -> bool | str:
    """Return whether certificates are checked, or the path of those that are trusted."""
    word = str(value).strip()
    return {"true": True, "false": False}.get(word.lower(), word)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(json.loads(value) if isinstance(value, str) else value)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "")}


def _check_known(
    where: str, found: Mapping[str, Any], known: tuple[str, ...], shown: tuple[str, ...] = ()
) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise DataError(
            f"has {unknown[0][:_SHOWN]!r} in its {where}, which means nothing to an S3 datastore. Understood are "
            f"{', '.join(shown or known)}"
            f"{', and the arguments of s3fs.S3FileSystem' if shown else ''}.{suggest(unknown[0], known)}"
        )


def _driver_arguments() -> set[str]:
    """Return the names of the filesystem's arguments; none if the driver is not there, which is told elsewhere."""
    try:
        from s3fs.core import S3FileSystem
    except ImportError:
        return set()
    own = set(inspect.signature(S3FileSystem.__init__).parameters)
    return (own - _NOT_ARGUMENTS) | _OF_FSSPEC
