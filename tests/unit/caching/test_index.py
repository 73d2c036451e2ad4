"""The metadata index on SQLite."""

from __future__ import annotations

import subprocess
import sys

import pytest

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.caching.schema import HEAD, open_engine
from airflow_mlpipelines.exceptions import CacheError
from tests.unit.caching.index_contract import IndexContract


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/new/metadata.db"


class TestSqliteIndex(IndexContract):
    """Everything that an index promises."""


def test_nothing_is_made_before_it_is_needed(tmp_path, url):
    MetadataIndex(url)

    assert list(tmp_path.iterdir()) == []


def test_readers_do_not_wait_for_a_writer(url):
    index = MetadataIndex(url)
    with index.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    with index.engine.begin():
        assert index.find_entries(["a"]) == {}


def test_alembic_is_imported_only_to_migrate(url):
    program = (
        "import sys\n"
        "from airflow_mlpipelines.caching.index import MetadataIndex\n"
        f"MetadataIndex({url!r}).find_entries(['a'])\n"
        "print('alembic' in sys.modules, 'airflow' in sys.modules, 'sqlalchemy.orm' in sys.modules)\n"
    )
    outcomes = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]

    assert [outcome.stdout.split() for outcome in outcomes] == [
        ["True", "False", "False"],
        ["False", "False", "False"],
    ]


def test_the_newest_migration_is_the_one_that_the_code_names(url):
    from alembic.script import ScriptDirectory

    from airflow_mlpipelines.caching.schema import make_alembic_config

    with open_engine(url).connect() as connection:
        scripts = ScriptDirectory.from_config(make_alembic_config(connection))
    assert scripts.get_heads() == [HEAD]


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "metadata.db").write_text(
        "this is no database, and long enough to be none at all" * 9
    )

    with pytest.raises(CacheError, match=r"metadata.db can't be used: file is not a database"):
        MetadataIndex(f"sqlite:///{tmp_path}/metadata.db").find_entries(["a"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(CacheError, match=r"can't be used: .*metadata_conn_id"):
        MetadataIndex(f"sqlite:///{tmp_path}/file/metadata.db").find_entries(["a"])


@pytest.mark.parametrize("url", ["nonsense", "mystery://host/db", "mysql+nodriver://host/db"])
def test_a_url_of_no_database_is_refused_without_showing_it(url):
    with pytest.raises(CacheError, match="metadata_conn_id") as caught:
        MetadataIndex(url).find_entries(["a"])
    assert url not in str(caught.value)


def test_the_password_of_a_database_that_does_not_answer_is_not_shown():
    with pytest.raises(CacheError, match=r"127.0.0.1:9/.* can't be used") as caught:
        MetadataIndex("postgresql://user:pa55w0rd@127.0.0.1:9/db").find_entries(["a"])
    assert "pa55w0rd" not in str(caught.value)
