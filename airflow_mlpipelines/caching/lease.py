"""Leases: the right to compute a fingerprint, held by one at a time.

All times are the database's own, so clocks of machines that disagree do no harm; nor does a clock that is
put back: a lease from its future lasts no longer than a new one.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlpipelines.caching.statements import seconds_now
from airflow_mlpipelines.caching.tables import leases

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Row

    from airflow_mlpipelines.caching.index import MetadataIndex

LEFT_SECONDS = 300.0
"""How long the lease of a step that runs without a worker lasts while nobody is there to renew it: long enough for a
triggerer to be started again."""
_CLOCK_TOLERANCE = 1.0


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

        Raises:
            CacheError: The database can't be asked.
        """
        token = uuid.uuid4().hex
        while True:
            with self._index.writing() as connection:
                if self._take(connection, fingerprint, holder, token, ttl):
                    return Lease(fingerprint, holder, token)
                found = self._find(connection, fingerprint)
            if found is not None:  # else given back by its holder between the two statements
                return Held(found.holder, self._seconds_left(found))

    def _take(
        self, connection: Connection, fingerprint: str, holder: str, token: str, ttl: float
    ) -> bool:
        """Put the row there unless somebody holds the lease: one statement, so one of us wins."""
        if connection.dialect.name == "postgresql":
            from sqlalchemy.dialects.postgresql import insert
        else:
            from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
        now = seconds_now(connection)
        ours = {"holder": holder, "token": token, "renewed_at": now, "expires_at": now + ttl}
        statement = insert(leases).values(fingerprint=fingerprint, **ours)
        new = statement.excluded
        taken: Any = connection.execute(
            statement.on_conflict_do_update(
                index_elements=[leases.c.fingerprint],
                set_={name: new[name] for name in ours},
                where=sa.or_(leases.c.expires_at <= new.renewed_at, leases.c.holder == new.holder),
            ),
            execution_options={"preserve_rowcount": True},
        )
        return bool(taken.rowcount)

    def _find(self, connection: Connection, fingerprint: str) -> Row[Any] | None:
        """Return the row of a lease, with the time at which it was read as ``now``."""
        query = sa.select(leases, seconds_now(connection).label("now"))
        return connection.execute(query.where(leases.c.fingerprint == fingerprint)).one_or_none()

    def renew(self, lease: Lease, *, ttl: float) -> bool:
        """Put off the end of a lease; return whether it is still ours.

        Raises:
            CacheError: The database can't be asked; the lease may be ours or not.
        """
        with self._index.writing() as connection:
            now = seconds_now(connection)
            renewed: Any = connection.execute(
                sa.update(leases)
                .where(leases.c.fingerprint == lease.fingerprint, leases.c.token == lease.token)
                .values(renewed_at=now, expires_at=now + ttl)
            )
            return bool(renewed.rowcount)

    def release(self, lease: Lease) -> None:
        """Give a lease back; nothing happens if it is no longer ours.

        Raises:
            CacheError: The database can't be asked; the lease will run out by itself.
        """
        with self._index.writing() as connection:
            connection.execute(
                sa.delete(leases).where(
                    leases.c.fingerprint == lease.fingerprint, leases.c.token == lease.token
                )
            )

    def find(self, fingerprint: str) -> Held | None:
        """Return who holds the lease, or None if it is free or has run out."""
        with self._index.reading() as connection:
            found = self._find(connection, fingerprint)
        left = self._seconds_left(found) if found is not None else 0.0
        return Held(found.holder, left) if found is not None and left > 0 else None

    def _seconds_left(self, found: Row[Any]) -> float:
        """Return how long a lease lasts; if the clock was put back, let it count from now."""
        now: float = found.now
        left: float = found.expires_at - now
        if found.renewed_at <= now + _CLOCK_TOLERANCE:
            return left
        ttl: float = found.expires_at - found.renewed_at
        with self._index.writing() as connection:
            connection.execute(
                sa.update(leases)
                .where(
                    leases.c.fingerprint == found.fingerprint,
                    leases.c.token == found.token,
                    leases.c.renewed_at == found.renewed_at,
                )
                .values(renewed_at=now, expires_at=now + ttl)
            )
        return ttl
