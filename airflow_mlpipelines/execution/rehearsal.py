"""What a step asks of the metadata database, asked once in the process from which steps are forked.

SQLAlchemy makes text of a statement when it first meets it, and a forked process finds what its parent
had made. So a step begins with statements that are ready, and with a database known to be of this release.
"""

from __future__ import annotations

from contextlib import suppress

from airflow_mlpipelines.caching.index import RAN, CacheEntry, MetadataIndex, StepRunRecord
from airflow_mlpipelines.caching.lease import Lease, Leases

_NAME = "rehearsal"


class _Undo(Exception):  # noqa: N818 - no error: it undoes the transaction
    pass


def rehearse_step(index: MetadataIndex) -> None:
    """Go through a step's transactions in one, and undo it; leave no connection open.

    Raises:
        CacheError: The database can't be asked.
    """
    entry = CacheEntry(_NAME, _NAME, _NAME, _NAME, {}, {}, 0.0, _NAME, _NAME)
    record = StepRunRecord(_NAME, _NAME, _NAME, _NAME, _NAME, _NAME, RAN, _NAME)
    with suppress(_Undo), index.writing():
        index.find_plan(_NAME, _NAME, _NAME)
        leases = Leases(index)
        lease = leases.acquire(_NAME, _NAME, ttl=1)
        index.find_entries([_NAME])
        index.put_entry(entry)
        index.record_step_runs([record])
        if isinstance(lease, Lease):
            leases.release(lease)
        raise _Undo
    index.engine.dispose()
