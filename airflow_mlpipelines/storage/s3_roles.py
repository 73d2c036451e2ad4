"""Roles that an S3 datastore is used with: AWS gives keys for an hour or so, which are renewed as long as it takes.

The role is an argument of the datastore like its keys, as plain data: so a pod's agent takes it on by itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._digest import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiobotocore.session import AioSession

ROLE = "assume_role"
"""The argument: ``arguments`` of AWS's call ``AssumeRole``; where it is not AWS itself that is asked, its ``endpoint_url``;
and ``token_file``, whose content proves who asks, instead of keys."""
_KEYS = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
}
_CONFIG = ("proxies", "proxies_config", "connect_timeout", "read_timeout", "retries", "client_cert")
_sessions: dict[tuple[int, str], AioSession] = {}
"""By process, which shares no locks with the one that it was forked from, and by arguments."""


def take_on_role(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for the s3fs filesystem, with a session that has the role; nothing is asked yet.

    Args:
        arguments: Those of the datastore. Without a role among them, they are returned as they are.
    """
    if ROLE not in arguments:
        return dict(arguments)
    known = os.getpid(), digest("s3-role-v1", json.dumps(arguments, sort_keys=True, default=repr))
    if known not in _sessions:
        _sessions[known] = _make_session(arguments)
    own = {ROLE, "profile", *_KEYS}
    rest = {name: value for name, value in arguments.items() if name not in own}
    return {**rest, "session": _sessions[known]}


def _make_session(arguments: Mapping[str, Any]) -> AioSession:
    from aiobotocore.credentials import AioDeferredRefreshableCredentials
    from aiobotocore.session import AioSession

    credentials = AioDeferredRefreshableCredentials(_make_call(arguments), method="assume-role")

    class Provider:
        async def load_credentials(self) -> Any:
            return credentials

    session = AioSession()
    session.register_component("credential_provider", Provider())
    return session


def _make_call(arguments: Mapping[str, Any]) -> Any:
    """Return what asks for new keys, with the keys or the profile that the connection has, or else this machine's."""
    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession

    role = arguments[ROLE]
    own = arguments.get("client_kwargs") or {}
    config = arguments.get("config_kwargs") or {}
    client = {
        **{name: own[name] for name in ("region_name", "verify") if name in own},
        **{word: arguments[name] for name, word in _KEYS.items() if arguments.get(name)},
        "endpoint_url": role.get("endpoint_url"),
        "config": AioConfig(**{name: config[name] for name in _CONFIG if name in config}),
    }
    session = AioSession(profile=arguments.get("profile"))

    async def assume() -> dict[str, str]:
        asked = dict(role["arguments"])
        async with session.create_client("sts", **client) as sts:
            if "token_file" in role:  # it is written anew from time to time
                asked["WebIdentityToken"] = Path(role["token_file"]).read_text("utf-8").strip()
                answer = await sts.assume_role_with_web_identity(**asked)
            else:
                answer = await sts.assume_role(**asked)
        keys = answer["Credentials"]
        return {
            "access_key": keys["AccessKeyId"],
            "secret_key": keys["SecretAccessKey"],
            "token": keys["SessionToken"],
            "expiry_time": keys["Expiration"].isoformat(),
        }

    return assume
