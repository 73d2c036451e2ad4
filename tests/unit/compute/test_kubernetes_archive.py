"""What travels to a step's pod."""

from __future__ import annotations

from airflow_mlpipelines.compute.base import Stage
from airflow_mlpipelines.compute.kubernetes.archive import stage_members


def test_a_directory_of_files_to_upload_is_made_in_the_pod_and_an_output_is_not(tmp_path):
    places = {name: tmp_path / name for name in ("code", "run", "runtime", "outputs")}
    for place in places.values():
        place.mkdir()
    outputs = {name: places["outputs"] / name for name in ("table", "place")}
    outputs["place"].mkdir()
    stage = Stage(
        root=tmp_path,
        code=places["code"],
        runtime=places["runtime"],
        run=places["run"],
        inputs={},
        outputs=outputs,
        outputs_root=places["outputs"],
    )

    names = {member.name for member in stage_members(stage)}

    assert "outputs/place" in names
    assert "outputs/table" not in names
