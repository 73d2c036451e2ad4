"""A program in Azure ML's words runs as it stands, in a process of its own, without any set-up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_mlpipelines.caching.index import MetadataIndex

PROGRAM = """
from airflow_mlpipelines import (
    DataReference, Datastore, Experiment, Pipeline, PipelineData, PythonScriptStep, Workspace
)

ws = Workspace.from_config()
store = Datastore(ws, "workspaceblobstore")
target = ws.compute_targets["local"]

raw = DataReference(
    datastore=store, data_reference_name="raw", path_on_datastore="flights/2013.csv"
)
clean = PipelineData("clean", datastore=store, output_name="clean_flights")
step = PythonScriptStep(
    script_name="clean.py",
    arguments=["--in", raw, "--out", clean],
    inputs=[raw],
    outputs=[clean],
    compute_target=target,
    source_directory="flights",
)

run = Experiment(ws, "flights").submit(Pipeline(workspace=ws, steps=[step]))
run.wait_for_completion()
"""
CLEAN = """
import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--in", dest="source")
parser.add_argument("--out")
args = parser.parse_args()
with open(args.source) as source, open(args.out, "w") as target:
    target.writelines(line for line in source if "NA" not in line)
"""


@pytest.fixture
def home(tmp_path):
    """The home of an Airflow that nobody has used, with the flights on its embedded datastore."""
    home = tmp_path / "airflow"
    flights = home / "mlpipelines" / "data" / "flights" / "2013.csv"
    flights.parent.mkdir(parents=True)
    flights.write_text("carrier,delay\nUA,2\nAA,NA\nB6,-4\n")
    return home


@pytest.mark.airflow
def test_the_program_runs_as_it_stands(tmp_path, home):
    (tmp_path / "flights").mkdir()
    (tmp_path / "flights" / "clean.py").write_text(CLEAN)
    program = tmp_path / "flights_program.py"
    program.write_text(PROGRAM)
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIRFLOW", "MLPIPELINES"))
    }

    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env={**own, "AIRFLOW_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    told = [line.split()[:2] for line in done.stderr.splitlines() if line.startswith("ran ")]
    assert told == [["ran", "clean.py"]]
    (record,) = MetadataIndex(f"sqlite:///{home}/mlpipelines/metadata.db").find_step_runs()
    assert (record.dag_id, record.step, record.state) == ("flights_program", "clean", "ran")
    assert list(record.outputs) == ["clean_flights"]
    made = Path(record.outputs["clean_flights"].uri.removeprefix("file://"))
    assert made.read_text() == "carrier,delay\nUA,2\nB6,-4\n"
