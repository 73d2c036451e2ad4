"""The command line called in this process, and a small pipeline in a file for it."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.cli import main

WORKSPACE = """
name: test
default_datastore: store
datastores:
  store: {url: data}
computes:
  local: {type: local}
"""
WORDS = """
from airflow_mlpipelines import (
    CommandStep, DataReference, Pipeline, PipelineData, PipelineParameter, Workspace
)

ws = Workspace.from_config()
raw = DataReference(ws.default_datastore, "raw", "words/raw.txt")
upper, total = PipelineData("upper"), PipelineData("total", pipeline_output_name="total")
rate = PipelineParameter("rate", 0.5, minimum=0.0, maximum=1.0)
top = PipelineParameter("top", 3)
mode = PipelineParameter("mode", "fast", choices=["fast", "exact"])
dry = PipelineParameter("dry", False)

tidy = CommandStep(
    ["sh", "-c", 'tr a-z A-Z < "$0" > "$1"', raw, upper], "tidy", inputs=[raw], outputs=[upper]
)
count = CommandStep(
    ["sh", "-c", 'wc -w < "$0" > "$1"', upper, total, rate, top, mode, dry],
    "count", inputs=[upper], outputs=[total],
)
pipeline = Pipeline(ws, [tidy, count], name="words")
"""


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output, read as JSON."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def mlpipelines(monkeypatch, capsys):
    """Call ``mlpipelines`` as the console script does, in this process."""

    # Else the command gives Airflow its settings, for the tests that follow too.
    importlib.import_module("airflow.configuration")
    monkeypatch.setenv("AIRFLOW__LOGGING__LOGGING_LEVEL", "WARNING")

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["mlpipelines", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return Answer(ended.value.code or 0, told.out, told.err)

    return call


@pytest.fixture
def write(tmp_path):
    """Write a Python file beside a workspace file of one datastore and one compute."""
    (tmp_path / "mlpipelines.yaml").write_text(WORKSPACE)

    def write_file(text: str, name: str = "words.py"):
        file = tmp_path / name
        file.write_text(text)
        return file

    return write_file


@pytest.fixture
def words(write, tmp_path):
    """The file of a pipeline ``tidy -> count`` with four parameters, and its data."""
    raw = tmp_path / "data" / "words" / "raw.txt"
    raw.parent.mkdir(parents=True)
    raw.write_text("air port\nair plane\n")
    return write(WORDS)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The metadata index that the commands use: an empty one."""
    url = f"sqlite:///{tmp_path}/metadata.db"
    monkeypatch.setenv("MLPIPELINES_METADATA_URL", url)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MetadataIndex(url)
