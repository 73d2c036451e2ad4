"""Datastores that another machine can open as well: described as plain JSON, with their credentials."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.storage.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.storage.stores import Store

Json = dict[str, Any]


def describe_store(store: Store) -> Json | None:
    """Return what opens the same datastore elsewhere; it holds its credentials, and is as secret as they are.

    None if only this machine can open it: a directory, the memory of this process, or one whose arguments are
    objects, or name files of this machine, such as a key, or a profile that is in one.
    """
    if store.is_local or store.protocol.extra is None or not _is_portable(store.arguments):
        return None
    return {"name": store.name, "url": store.url, "arguments": dict(store.arguments)}


def open_described(description: Mapping[str, Any]) -> Store:
    """Return the datastore that :func:`describe_store` described.

    Raises:
        DataError: Its driver is not installed here, or its arguments are wrong.
    """
    return open_store(description["name"], description["url"], credentials=description["arguments"])


def _is_portable(arguments: Mapping[str, Any]) -> bool:
    if "profile" in arguments:  # of ~/.aws/config
        return False
    try:
        json.dumps(arguments)
    except (TypeError, ValueError):
        return False
    return not any(_names_file(value) for value in _leaves(arguments))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _names_file(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~")) and _exists(value)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111 - maybe no path at all
    except ValueError:
        return False
