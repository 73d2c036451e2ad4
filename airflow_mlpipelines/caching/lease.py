"""Leases: the right to compute a fingerprint, held by one at a time.

All times are the database's own, so clocks of machines that disagree do no harm.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from airflow_mlpipelines.caching.index import upsert
from airflow_mlpipelines.caching.tables import leases
from airflow_mlpipelines.exceptions import CacheError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from airflow_mlpipelines.caching.index import MetadataIndex


@dataclass(frozen=True)
class Lease:
    """A lease that is ours until it expires or is released."""

    fingerprint: str
    holder: str
    token: str


@dataclass(frozen=True)
class Held:
    """A lease that somebody else holds.

    Attributes:
        by: Who, in words.
        seconds_left: When it runs out unless it is renewed.
    """

    by: str
    seconds_left: float


class Leases:
    """The leases of one metadata database."""

    def __init__(self, index: MetadataIndex) -> None:
        self._index = index

    def acquire(self, fingerprint: str, holder: str, *, ttl: float) -> Lease | Held:
        """Return the lease, or who holds it.

        One that has run out is taken over; so is one of the same holder, whose earlier try is lost.

        Args:
            fingerprint: What is going to be made.
            holder: Who is going to make it: the same for all tries of one task instance.
            ttl: Seconds after which it runs out unless it is renewed.
        """
        token = uuid.uuid4().hex
        try:
            with self._index.engine.begin() as connection:
                now = _now(connection)
                row = {
                    "fingerprint": fingerprint,
                    "holder": holder,
                    "token": token,
                    "acquired_at": now,
                    "expires_at": now + ttl,
                }
                taken = connection.execute(
                    sa.update(leases)
                    .where(
                        leases.c.fingerprint == fingerprint,
                        sa.or_(leases.c.expires_at <= now, leases.c.holder == holder),
                    )
                    .values(row)
                ).rowcount
                if not taken:
                    upsert(connection, leases, [row], update=False)
                found = connection.execute(
                    sa.select(leases).where(leases.c.fingerprint == fingerprint)
                ).one()
                if found.token == token:
                    return Lease(fingerprint, holder, token)
                return Held(found.holder, found.expires_at - now)
        except DBAPIError as error:
            raise CacheError(f"the lease could not be asked for: {error.orig}") from error

    def renew(self, lease: Lease, *, ttl: float) -> bool:
        """Put off the end of a lease; return whether it is still ours."""
        with self._index.engine.begin() as connection:
            renewed: Any = connection.execute(
                sa.update(leases)
                .where(leases.c.fingerprint == lease.fingerprint, leases.c.token == lease.token)
                .values(expires_at=_now(connection) + ttl)
            )
            return bool(renewed.rowcount)

    def release(self, lease: Lease) -> None:
        """Give a lease back; nothing happens if it is no longer ours."""
        with self._index.engine.begin() as connection:
            connection.execute(
                sa.delete(leases).where(
                    leases.c.fingerprint == lease.fingerprint, leases.c.token == lease.token
                )
            )

    def find(self, fingerprint: str) -> Held | None:
        """Return who holds the lease, or None if it is free or has run out."""
        with self._index.engine.connect().execution_options(reads_only=True) as connection:
            row = connection.execute(
                sa.select(leases).where(leases.c.fingerprint == fingerprint)
            ).one_or_none()
            if row is None:
                return None
            left = row.expires_at - _now(connection)
            return Held(row.holder, left) if left > 0 else None


def _now(connection: Connection) -> float:
    """Return seconds since 1970 by the database's clock."""
    if connection.dialect.name == "postgresql":
        query = sa.text("SELECT extract(epoch FROM clock_timestamp())")
    else:
        query = sa.text("SELECT (julianday('now') - 2440587.5) * 86400.0")
    return float(connection.execute(query).scalar_one())
