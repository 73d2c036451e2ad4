"""References in mode ``upload`` whose place is on versitygw."""

from __future__ import annotations

import pytest

from airflow_mlpipelines import CommandStep, DataReference, Pipeline, Workspace
from tests.dags.conftest import airflow_db  # noqa: F401 - a fixture
from tests.dags.project import run_dag
from tests.integration.s3_server import (  # noqa: F401 - fixtures
    bucket,
    make_connection,
    server,
)

pytestmark = [pytest.mark.s3, pytest.mark.airflow, pytest.mark.usefixtures("airflow_db")]


@pytest.fixture
def run(server, bucket, tmp_path, monkeypatch):  # noqa: F811
    """Runs a pipeline of one step with a shell script, whose files are uploaded to the bucket."""
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", make_connection(server))
    (tmp_path / "mlpipelines.yaml").write_text(
        "name: u\ndefault_datastore: here\ndatastores:\n  here: {url: data}\n"
        f"  lake: {{url: 's3://{bucket.name}/team', conn_id: lake}}\n"
    )

    def run(script, **options):
        ws = Workspace.from_config(tmp_path)
        place = DataReference(ws.datastores["lake"], "place", "place").as_upload(**options)
        step = CommandStep(["sh", "-c", script, "sh", place], name="write")
        return run_dag(Pipeline(ws, [step], name=f"upload_{bucket.name[-1]}").to_dag())

    return run


def test_files_are_uploaded_to_the_bucket_and_reused_until_it_changes(run, bucket):  # noqa: F811
    script = 'mkdir "$1/sub"; echo one > "$1/a.txt"; echo two > "$1/sub/b.txt"'
    bucket.put("team/place/theirs.txt", b"theirs")

    first = run(script)

    assert first.steps == {"write": "ran"}
    assert bucket.keys() == {f"team/place/{name}" for name in ("a.txt", "sub/b.txt", "theirs.txt")}
    assert bucket.get("team/place/sub/b.txt") == b"two\n"
    assert first.outputs["write"]["place"]["uri"] == f"s3://{bucket.name}/team/place"
    assert run(script).steps == {"write": "reused"}

    bucket.put("team/place/a.txt", b"ONE\n")
    refused = run(script)
    assert refused.state == "failed"
    assert "holds ['a.txt'] already, with other content" in refused.reasons["write"]
    assert bucket.get("team/place/a.txt") == b"ONE\n"

    assert run(script, overwrite=True).steps == {"write": "ran"}
    assert bucket.get("team/place/a.txt") == b"one\n"
