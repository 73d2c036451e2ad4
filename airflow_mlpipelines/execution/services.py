"""What carrying out a step needs of the world around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.compute.base import Emit, HandleStore, Launcher
    from airflow_mlpipelines.storage.blobs import BlobCache
    from airflow_mlpipelines.storage.stat_cache import StatCache
    from airflow_mlpipelines.storage.stores import StoreSet


@dataclass(frozen=True)
class Services:
    """What a step needs of the world around it.

    Attributes:
        secrets: Environment variables of the step's process that must be seen nowhere else.
        handle: Remembers what was launched, for a retry after the worker was lost.
        emit: Takes a line for the step's log.
        blobs: Data of remote datastores that this machine has fetched before.
        may_detach: Whether a program that takes long may go on without a worker.
        writer: Whose entries these are, such as the Airflow deployment's name.
    """

    index: MetadataIndex
    stores: StoreSet
    launcher: Launcher
    handle: HandleStore
    emit: Emit
    blobs: BlobCache
    secrets: Mapping[str, str] = field(default_factory=dict)
    cache: StatCache | None = None
    may_detach: bool = False
    writer: str = ""
