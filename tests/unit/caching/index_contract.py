"""What the metadata index and its leases promise on every database. Subclasses say on which."""

from __future__ import annotations

import math
import os
import time
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from airflow_mlpipelines.caching.index import MetadataIndex, StepRunRecord
from airflow_mlpipelines.caching.lease import Held, Lease, Leases
from airflow_mlpipelines.caching.schema import HEAD, VERSION_TABLE, make_alembic_config, open_engine
from airflow_mlpipelines.caching.tables import leases, metadata
from airflow_mlpipelines.exceptions import CacheError
from tests.unit.caching import racers
from tests.unit.caching.racers import make_artifact, make_entry, make_fingerprint, run_processes


def make_run(step: str = "step", **fields) -> StepRunRecord:
    defaults = {
        "dag_id": "dag",
        "run_id": "run",
        "task_id": step,
        "pipeline": "pipeline",
        "step": step,
        "step_run": "mlp-1",
        "state": "ran",
        "reason": "never ran before",
        "ingredients": {"code": "a"},
        "finished_at": datetime(2026, 11, 21, 5, 0, 0, 250000, tzinfo=UTC),
    }
    return StepRunRecord(**{**defaults, **fields})


class IndexContract:
    """Promises of the index; ``url`` is an empty database."""

    @pytest.fixture
    def index(self, url):
        return MetadataIndex(url)

    # ---- entries

    def test_an_entry_comes_back_whole(self, index):
        entry = make_entry(1, ingredients={"parameters": {"rate": 0.1, "n": 1, "on": True}})
        index.put_entry(entry)

        assert index.find_entries([make_fingerprint(1), make_fingerprint(2)]) == {
            entry.fingerprint: entry
        }
        assert index.get_entry(entry.fingerprint) == entry
        assert index.list_entries() == [entry]

    def test_nothing_is_found_in_an_empty_index(self, index):
        assert index.find_entries([]) == {}
        assert index.find_entries([make_fingerprint(1)]) == {}
        assert index.find_newest_entries("pipeline", ["step"]) == {}
        assert index.find_step_runs() == []
        assert index.find_earlier_runs("pipeline", ["step"]) == {}
        assert index.get_contents(["a"]) == {}

    def test_a_later_entry_replaces_an_earlier_one_whole(self, index):
        index.put_entry(make_entry(1, writer="one", ingredients={"code": "a"}))
        later = make_entry(1, writer="two", ingredients={}, outputs={"b": make_artifact("b")})
        index.put_entry(later)

        assert index.list_entries() == [later]

    def test_many_fingerprints_are_looked_up_in_one_statement(self, index, statements):
        for number in range(3):
            index.put_entry(make_entry(number))
        statements.clear()

        found = index.find_entries([make_fingerprint(number) for number in range(5000)])

        assert len(found) == 3
        assert len([text for text in statements if "SELECT" in text]) == 1

    def test_the_newest_entry_of_each_step_is_found_in_one_statement(self, index, statements):
        now = datetime.now(UTC)
        for number, (pipeline, step, age) in enumerate(
            [
                ("p", "a", 3),
                ("p", "a", 1),
                ("p", "a", 2),
                ("p", "b", 9),
                ("q", "a", 0),
                ("p", "c", 0),
            ]
        ):
            index.put_entry(
                make_entry(
                    number, pipeline=pipeline, step=step, created_at=now - timedelta(hours=age)
                )
            )
        statements.clear()

        found = index.find_newest_entries("p", ["a", "b", "d"])

        assert set(found) == {make_fingerprint(1), make_fingerprint(3)}
        assert len([text for text in statements if "SELECT" in text]) == 1

    def test_entries_are_listed_newest_first_by_pipeline_and_step(self, index):
        now = datetime.now(UTC)
        for number, step in enumerate(["a", "a", "b"]):
            created_at = now + timedelta(seconds=number)
            index.put_entry(make_entry(number, step=step, created_at=created_at))

        assert [entry.fingerprint[-1] for entry in index.list_entries()] == ["2", "1", "0"]
        assert [entry.fingerprint[-1] for entry in index.list_entries(step="a")] == ["1", "0"]
        assert [entry.fingerprint[-1] for entry in index.list_entries(limit=1)] == ["2"]
        assert index.list_entries(pipeline="other") == []

    def test_an_entry_is_found_by_the_beginning_of_its_fingerprint(self, index):
        for fingerprint in ("ab" + "0" * 62, "ac" + "0" * 62):
            index.put_entry(make_entry(1, fingerprint=fingerprint))

        assert index.get_entry("ab").fingerprint.startswith("ab")
        with pytest.raises(CacheError, match="more than one cache entry"):
            index.get_entry("a")
        for prefix in ("b", "%", "_", "a%"):
            with pytest.raises(CacheError, match="no cache entry"):
                index.get_entry(prefix)

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("outputs", "{"),
            ("outputs", "null"),
            ("outputs", '{"out": {"uri": "x"}}'),
            ("outputs", '{"out": {"$artifact": 999}}'),
            ("outputs", "[" * 100_000),
            ("ingredients", "7"),
        ],
    )
    def test_a_damaged_entry_is_a_miss_with_one_warning(self, index, column, value, caplog):
        index.put_entry(make_entry(1))
        index.put_entry(make_entry(2))
        with index.engine.begin() as connection:
            statement = f"UPDATE mlp_cache_entries SET {column} = :value WHERE fingerprint = :key"
            connection.execute(sa.text(statement), {"value": value, "key": make_fingerprint(1)})

        found = index.find_entries([make_fingerprint(1), make_fingerprint(2)])

        assert set(found) == {make_fingerprint(2)}
        (warning,) = [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("airflow_mlpipelines") and record.levelname == "WARNING"
        ]
        assert make_fingerprint(1) in warning
        assert "miss" in warning

    def test_an_entry_is_replaced_whole_also_by_many_at_once(self, url):
        run_processes(3, racers.replace_often, url, 25)

    # ---- contents

    def test_contents_are_kept_once_by_their_digest(self, index, statements):
        index.put_contents({"a": {"files": {"train.py": "1"}}, "b": {"packages": {}}})
        statements.clear()
        index.put_contents({"a": {"files": {"train.py": "1"}}})

        assert not any("INSERT" in text for text in statements)
        assert index.get_contents(["a", "c"]) == {"a": {"files": {"train.py": "1"}}}

    def test_damaged_contents_are_left_out(self, index):
        index.put_contents({"a": {"files": {}}})
        with index.engine.begin() as connection:
            connection.execute(sa.text("UPDATE mlp_contents SET content = '{'"))

        assert index.get_contents(["a"]) == {}

    # ---- step runs

    def test_a_step_run_comes_back_whole(self, index):
        record = make_run(
            outputs={"out": make_artifact()}, metrics={"loss": [1.0, 0.5]}, fingerprint="a" * 64
        )
        index.record_step_runs([record])

        assert index.find_step_runs(dag_id="dag", run_id="run", step="step") == [record]
        assert index.find_step_runs(dag_id="other") == []

    def test_values_that_are_no_json_elsewhere_are_kept(self, index):
        record = make_run(
            metrics={"loss": math.inf, "text": "\ud800\x00é"}, ingredients={"rate": -math.inf}
        )
        index.record_step_runs([record, make_run(metrics={"loss": math.nan})])

        nan, found = index.find_step_runs()
        assert found == record
        assert math.isnan(nan.metrics["loss"])

    def test_a_reason_may_quote_anything(self, index):
        index.record_step_runs([make_run(reason="it said \x00\ud800é")])

        assert index.find_step_runs()[0].reason == "it said \\0\\ud800é"

    def test_names_of_any_length_are_kept(self, index):
        record = make_run("s" * 1000, dag_id="d" * 1000, reason="r" * 5000)
        index.record_step_runs([record])

        assert index.find_step_runs() == [record]

    def test_step_runs_are_newest_first_and_limited(self, index):
        index.record_step_runs([make_run(run_id=str(number)) for number in range(1200)])

        assert [run.run_id for run in index.find_step_runs(limit=2)] == ["1199", "1198"]

    def test_a_damaged_step_run_is_shown_without_what_was_damaged(self, index):
        index.record_step_runs([make_run()])
        with index.engine.begin() as connection:
            connection.execute(
                sa.text("UPDATE mlp_step_runs SET outputs = '{', ingredients = '7', metrics = ''")
            )

        (run,) = index.find_step_runs()
        assert (run.outputs, run.ingredients, run.metrics) == ({}, None, {})
        assert run.reason == "never ran before"

    def test_the_last_few_runs_of_each_step_are_found_in_one_statement(self, index, statements):
        index.record_step_runs(
            [
                make_run("a", run_id="1"),
                make_run("a", run_id="2"),
                make_run("a", run_id="3", state="reused"),
                make_run("a", run_id="4", state="failed"),
                make_run("a", run_id="5", state="reused", ingredients=None),
                make_run("a", run_id="6", pipeline="other"),
                make_run("b", run_id="7"),
                make_run("c", run_id="8"),
            ]
        )
        statements.clear()

        found = index.find_earlier_runs("pipeline", ["a", "b"], depth=2)

        assert {step: [run.run_id for run in runs] for step, runs in found.items()} == {
            "a": ["3", "2"],
            "b": ["7"],
        }
        assert len([text for text in statements if "SELECT" in text]) == 1

    # ---- leases

    def test_a_lease_is_held_by_one(self, index):
        one, two = Leases(index), Leases(index)
        lease = one.acquire(make_fingerprint(1), "one", ttl=60)

        assert isinstance(lease, Lease)
        held = two.acquire(make_fingerprint(1), "two", ttl=60)
        assert isinstance(held, Held)
        assert held.by == "one"
        assert 55 < held.seconds_left <= 60
        assert two.find(make_fingerprint(1)).by == "one"
        assert isinstance(two.acquire(make_fingerprint(2), "two", ttl=60), Lease)

    def test_a_lease_given_back_is_free(self, index):
        leases = Leases(index)
        leases.release(leases.acquire(make_fingerprint(1), "one", ttl=60))

        assert leases.find(make_fingerprint(1)) is None
        assert isinstance(leases.acquire(make_fingerprint(1), "two", ttl=60), Lease)

    def test_a_lease_that_ran_out_is_taken_over(self, index):
        leases = Leases(index)
        lost = leases.acquire(make_fingerprint(1), "one", ttl=0)

        taken = leases.acquire(make_fingerprint(1), "two", ttl=60)

        assert isinstance(taken, Lease)
        assert not leases.renew(lost, ttl=60)
        leases.release(lost)
        assert leases.find(make_fingerprint(1)).by == "two"

    def test_a_lease_is_taken_over_by_the_next_try_of_its_holder(self, index):
        leases = Leases(index)
        lost = leases.acquire(make_fingerprint(1), "one", ttl=60)

        assert isinstance(leases.acquire(make_fingerprint(1), "one", ttl=60), Lease)
        assert not leases.renew(lost, ttl=60)

    def test_a_renewed_lease_lasts_longer(self, index):
        leases = Leases(index)
        lease = leases.acquire(make_fingerprint(1), "one", ttl=0)

        assert leases.renew(lease, ttl=60)
        assert isinstance(leases.acquire(make_fingerprint(1), "two", ttl=60), Held)

    @pytest.mark.parametrize("ask", ["find", "acquire"])
    def test_a_clock_that_was_put_back_prolongs_no_lease_for_long(self, index, ask):
        one = Leases(index)
        one.acquire(make_fingerprint(1), "one", ttl=60)
        with index.engine.begin() as connection:  # as if all that had been an hour from now
            connection.execute(
                sa.update(leases).values(
                    renewed_at=leases.c.renewed_at + 3600, expires_at=leases.c.expires_at + 3600
                )
            )

        for _ in range(2):
            held = (
                one.find(make_fingerprint(1))
                if ask == "find"
                else one.acquire(make_fingerprint(1), "two", ttl=60)
            )
            assert isinstance(held, Held)
            assert held.seconds_left <= 60

    def test_a_dead_holder_s_lease_is_taken_over_when_it_runs_out(self, index, url):
        leases = Leases(index)
        racers.run_to_death(racers.die_holding, url, 1.0)

        deadline = time.monotonic() + 20
        while isinstance(taken := leases.acquire(make_fingerprint(1), "the heir", ttl=60), Held):
            assert taken.by == "the dead"
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_of_many_processes_exactly_one_produces(self, url, tmp_path):
        log = tmp_path / "produced"
        rounds = self.race_rounds

        run_processes(self.race_processes, racers.produce_once, url, rounds, str(log))

        assert sorted(map(int, log.read_text().split())) == list(range(rounds))

    race_processes = 4
    race_rounds = 40

    # ---- the schema

    def test_many_processes_may_be_the_first(self, url):
        run_processes(self.race_processes, racers.open_at_once, url)

        assert len(MetadataIndex(url).list_entries()) == self.race_processes

    def test_the_migrations_make_the_tables_that_the_code_knows(self, url):
        from alembic.autogenerate import compare_metadata
        from alembic.migration import MigrationContext

        with open_engine(url).connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
            )
            assert compare_metadata(context, metadata) == []

    def test_the_migrations_can_be_undone_and_done_again(self, url):
        from alembic import command

        engine = open_engine(url)
        with engine.begin() as connection:
            command.downgrade(make_alembic_config(connection), "base")
        with engine.begin() as connection:
            tables = sa.inspect(connection).get_table_names()
            assert tables == [VERSION_TABLE]
            command.upgrade(make_alembic_config(connection), HEAD)

        MetadataIndex(url).put_entry(make_entry(1))

    def test_a_process_killed_while_migrating_leaves_nothing(self, url):
        racers.run_to_death(die_migrating, url)

        MetadataIndex(url).put_entry(make_entry(1))

    def test_a_database_of_a_newer_release_is_refused(self, url):
        engine = open_engine(url)
        with engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        forget_engines()

        with pytest.raises(CacheError, match=rf"version '9999'.* newer release .*'{HEAD}'"):
            MetadataIndex(url).find_entries([])

    def test_a_database_of_an_earlier_release_is_brought_to_this_one(self, url):
        from alembic import command

        engine = open_engine(url)
        with engine.begin() as connection:
            command.downgrade(make_alembic_config(connection), "0001")
        MetadataIndex(url).put_entry(make_entry(1))
        forget_engines()

        index = MetadataIndex(url)
        index.put_plan("dag", "run", "cache_sensor", {"version": 1})

        assert index.find_plan("dag", "run", "cache_sensor") == {"version": 1}
        assert len(index.list_entries()) == 1

    # ---- plans

    def test_a_plan_replaces_the_earlier_one_of_its_task_and_no_other(self, index):
        index.put_plan("dag", "run", "a.cache_sensor", {"steps": {"one": 1}})
        index.put_plan("dag", "run", "b.cache_sensor", {"steps": {"two": 1}})
        index.put_plan("dag", "run", "a.cache_sensor", {"steps": {"one": 2}})

        assert index.find_plan("dag", "run", "a.cache_sensor") == {"steps": {"one": 2}}
        assert index.find_plan("dag", "run", "b.cache_sensor") == {"steps": {"two": 1}}
        assert index.find_plan("dag", "other run", "a.cache_sensor") is None

    def test_a_forked_process_has_connections_of_its_own(self, index):
        index.put_entry(make_entry(1))
        with index.engine.connect() as one, index.engine.connect() as two:
            inherited = [item.connection.dbapi_connection for item in (one, two)]  # all in the pool
        child = os.fork()
        if child == 0:
            good = False
            try:
                with index.engine.connect() as connection:
                    good = connection.connection.dbapi_connection not in inherited
                index.put_entry(make_entry(2))
            finally:
                os._exit(0 if good else 1)

        assert os.waitpid(child, 0)[1] == 0
        with index.engine.connect() as connection:
            assert connection.connection.dbapi_connection in inherited
        assert len(index.list_entries()) == 2

    @pytest.fixture
    def statements(self, index):
        """The SQL that the index runs."""
        seen: list[str] = []
        engine = index.engine

        def note(_connection, _cursor, statement, *_):
            seen.append(statement)

        sa.event.listen(engine, "before_cursor_execute", note)
        yield seen
        sa.event.remove(engine, "before_cursor_execute", note)


def forget_engines() -> None:
    """Be as a process that has just started."""
    from airflow_mlpipelines.caching import schema

    while schema._engines:
        schema._engines.popitem()[1].dispose()


def die_migrating(_barrier, _number, url) -> None:
    """Be killed half-way through a migration."""
    import signal

    from alembic.operations import Operations

    Operations.create_index = lambda *_a, **_k: os.kill(os.getpid(), signal.SIGKILL)
    open_engine(url)
