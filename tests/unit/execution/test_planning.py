"""Planning a run: what is kept of the data that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines import CommandStep, DataReference, Datastore, Pipeline, Workspace
from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.execution.planning import plan_run
from airflow_mlpipelines.storage.blobs import BlobCache
from airflow_mlpipelines.storage.stores import StoreSet, open_store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("modes", [["direct"], ["mount"], ["direct", "download"]])
def test_data_are_kept_for_the_steps_that_get_them_and_not_for_those_that_get_their_address(
    tmp_path: Path, modes: list[str]
) -> None:
    url = f"memory://{tmp_path.name}"
    (tmp_path / "mlpipelines.yaml").write_text(
        f"name: w\ndefault_datastore: here\ndatastores:\n  here: {{url: data}}\n  lake: {{url: '{url}'}}\n"
    )
    workspace = Workspace.from_config(tmp_path)
    lake = open_store("lake", url)
    lake.write_bytes("raw/words.txt", b"one")
    steps = []
    for number, mode in enumerate(modes):
        raw = DataReference(Datastore(workspace, "lake"), "raw", "raw", mode=mode)
        steps.append(CommandStep(["cat", raw], name=f"step_{number}", inputs=[raw]))
    blobs = BlobCache(tmp_path / "blobs")

    plan = plan_run(
        Pipeline(workspace, steps, name="p").graph,
        parameters={},
        regenerate=(),
        index=MetadataIndex(f"sqlite:///{tmp_path}/metadata.db"),
        stores=StoreSet([open_store("here", f"file://{tmp_path}/data"), lake], "here"),
        blobs=blobs,
    )
    lake.delete("")

    (pinned,) = plan.external.values()
    assert pinned is not None
    assert blobs.path_of(pinned.digest).exists() == (modes != ["direct"])
