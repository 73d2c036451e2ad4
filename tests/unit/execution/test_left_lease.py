"""The lease of a step whose program goes on without a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import pytest

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.caching.lease import Held, Lease, Leases
from airflow_mlpipelines.exceptions import CacheError
from airflow_mlpipelines.execution.heartbeat import LeaseHeldError, hold_lease

if TYPE_CHECKING:
    from pathlib import Path


class _WayOutError(Exception):
    pass


def test_a_lease_that_was_left_keeps_others_out_until_its_holder_is_back(tmp_path: Path) -> None:
    index = MetadataIndex(f"sqlite:///{tmp_path / 'metadata.db'}")
    with pytest.raises(_WayOutError), hold_lease(index, "f" * 64, "mine") as held:  # noqa: PT012
        left = Lease(**held.leave())
        raise _WayOutError
    assert Leases(index).renew(left, ttl=60)
    with pytest.raises(LeaseHeldError), hold_lease(index, "f" * 64, "another's"):
        pass
    with hold_lease(index, "f" * 64, "mine"):
        pass
    assert not isinstance(Leases(index).acquire("f" * 64, "another's", ttl=60), Held)


def test_a_lease_that_was_left_outlasts_a_triggerer_that_starts_anew(tmp_path: Path) -> None:
    index = MetadataIndex(f"sqlite:///{tmp_path / 'metadata.db'}")
    with pytest.raises(_WayOutError), hold_lease(index, "f" * 64, "mine") as held:  # noqa: PT012
        held.leave()
        raise _WayOutError
    found = Leases(index).find("f" * 64)
    assert found is not None
    assert 240 < found.seconds_left <= 300


def test_a_lease_is_left_also_while_the_database_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = MetadataIndex(f"sqlite:///{tmp_path / 'metadata.db'}")
    with pytest.raises(_WayOutError), hold_lease(index, "f" * 64, "mine") as held:  # noqa: PT012
        with monkeypatch.context() as patch:
            patch.setattr(index, "writing", _be_away)
            left = Lease(**held.leave())
        raise _WayOutError
    assert "could not be renewed: the database is away" in caplog.text
    assert Leases(index).renew(left, ttl=60)


def _be_away() -> NoReturn:
    raise CacheError("the database is away")
