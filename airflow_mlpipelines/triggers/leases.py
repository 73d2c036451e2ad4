"""The leases of the metadata database, as a trigger comes to them: by what Airflow itself knows of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_mlpipelines.caching.lease import Leases


def open_leases() -> Leases:
    """Return the leases; it may take a moment, in which the database's address is asked for."""
    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.caching.lease import Leases
    from airflow_mlpipelines.operators.connections import metadata_url

    return Leases(MetadataIndex(metadata_url()))


def renew_left(lease: dict[str, str]) -> dict[str, str]:
    """Return the lease, renewed; taken anew if it ran out while no triggerer was there, and nobody has it.

    Raises:
        CacheError: The database can't be asked.
    """
    from airflow_mlpipelines.caching.lease import LEFT_SECONDS, Lease

    leases, held = open_leases(), Lease(**lease)
    if leases.renew(held, ttl=LEFT_SECONDS) or leases.find(held.fingerprint) is not None:
        return lease
    again = leases.acquire(held.fingerprint, held.holder, ttl=LEFT_SECONDS)
    return asdict(again) if isinstance(again, Lease) else lease


def release_left(lease: dict[str, str]) -> None:
    """Give the lease back.

    Raises:
        CacheError: The database can't be asked; the lease will run out by itself.
    """
    from airflow_mlpipelines.caching.lease import Lease

    open_leases().release(Lease(**lease))
