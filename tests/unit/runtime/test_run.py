"""Run, from inside a step's process, on the oldest Python that it is promised for and on ours."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from airflow_mlpipelines.runtime.contract import step_environment
from airflow_mlpipelines.runtime.metrics import PARENT_RUN, read_metrics
from airflow_mlpipelines.runtime.stage import stage_runtime
from tests.parts import require_python


@pytest.fixture(params=[pytest.param("3.8", marks=pytest.mark.python38), "own"])
def python(request: pytest.FixtureRequest) -> Path:
    return Path(sys.executable) if request.param == "own" else require_python(request.param)


class Step:
    """Runs scripts as a step's process does: with the staged runtime package and nothing of ours."""

    def __init__(self, root: Path, python: Path) -> None:
        self.python = python
        self.code = root / "code"
        self.run_directory = root / "run"
        for directory in (self.code, self.run_directory):
            directory.mkdir()
        self.variables = step_environment(
            run_id="mlp-1",
            step="train",
            pipeline="churn",
            run_directory=str(self.run_directory),
            runtime=str(stage_runtime(root / "runtime")),
            inputs={},
            outputs={},
            params={},
            parent_run_id="scheduled__1",
        )

    def run(self, script: str, *, offline: bool = False) -> str:
        names = ["PYTHONPATH"] if offline else list(self.variables)
        done = subprocess.run(
            [str(self.python), "-W", "error", "-c", textwrap.dedent(script)],
            env={"PATH": os.environ["PATH"], **{name: self.variables[name] for name in names}},
            cwd=self.code,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def step(tmp_path: Path, python: Path) -> Step:
    return Step(tmp_path, python)


def test_a_run_knows_who_it_is(step: Step) -> None:
    printed = step.run(
        """
        from airflow_mlpipelines.azureml.core import Run
        run = Run.get_context()
        print(run.id, run.name, run.display_name, run.experiment.name)
        print(run.parent.id, run.parent.name, run.parent.parent)
        print(run)
        """
    )
    assert printed.splitlines() == [
        "mlp-1 train train churn",
        "scheduled__1 churn None",
        "Run(id='mlp-1', name='train', experiment='churn')",
    ]


def test_what_is_logged_comes_back(step: Step) -> None:
    printed = step.run(
        """
        from airflow_mlpipelines import Run
        run = Run.get_context(allow_offline=False)
        run.log("loss", 0.5, "how wrong", step=1)
        run.log("loss", 0.25, step=2)
        run.log_list("list", range(3))
        run.log_row("row", x=1, y=2)
        run.log_table("table", {"a": [1, 2], "b": "one"})
        run.parent.log("best", 0.9)
        run.flush()
        run.complete()
        print(run.get_metrics("loss"), run.get_metrics("none"), run.parent.get_metrics())
        """
    )
    assert printed.strip() == "{'loss': [0.5, 0.25]} {} {'best': 0.9}"
    assert read_metrics(step.run_directory) == {
        "loss": [0.5, 0.25],
        "list": [0, 1, 2],
        "row": {"x": 1, "y": 2},
        "table": {"a": [1, 2], "b": ["one"]},
    }
    assert read_metrics(step.run_directory, run=PARENT_RUN) == {"best": 0.9}


def test_files_are_kept_in_outputs_wherever_the_script_has_gone(step: Step) -> None:
    step.run(
        """
        import io, os
        from airflow_mlpipelines import Run
        run = Run.get_context()
        os.makedirs("made/deep")
        open("made/deep/a.txt", "w").write("a")
        os.chdir("made")
        run.upload_file("model.bin", io.BytesIO(b"model"))
        run.upload_file("logs/deep.txt", "deep/a.txt")
        run.upload_folder("outputs/all", ".")
        class Plot:
            def savefig(self, file, format):
                file.write(format.encode())
        run.log_image("curve", plot=Plot())
        run.log_image("picture", path="deep/a.txt")
        run.upload_file("outputs/model.bin", "../outputs/model.bin")
        """
    )
    found = {
        str(file.relative_to(step.code)): file.read_text()
        for top in ("outputs", "logs")
        for file in (step.code / top).rglob("*")
        if file.is_file()
    }
    assert found == {
        "outputs/model.bin": "model",
        "logs/deep.txt": "a",
        "outputs/all/deep/a.txt": "a",
        "outputs/curve.png": "png",
        "outputs/picture.txt": "a",
    }
    assert read_metrics(step.run_directory) == {
        "curve": "outputs/curve.png",
        "picture": "outputs/picture.txt",
    }


@pytest.mark.parametrize("name", ["../a", "/a", "", "outputs/../../a", "a\\0b"])
def test_no_file_is_kept_outside(step: Step, name: str) -> None:
    printed = step.run(
        f"""
        import io
        from airflow_mlpipelines import Run
        try:
            Run.get_context().upload_file("{name}", io.BytesIO(b""))
        except ValueError as error:
            print(error)
        """
    )
    assert "no relative path inside the run" in printed
    assert list(step.code.rglob("*")) == []


def test_outside_a_pipeline_the_same_script_says_what_it_logs(step: Step) -> None:
    printed = step.run(
        """
        from airflow_mlpipelines import Run
        run = Run.get_context()
        assert run.id.startswith("OfflineRun_") and Run.get_context() is run
        run.log("loss", 0.5, step=3)
        run.parent.log("best", 1)
        run.log_row("row", x=1)
        run.upload_file("a.txt", "nowhere")
        print(run.get_metrics())
        try:
            Run.get_context(allow_offline=False)
        except RuntimeError as error:
            print(error)
        """,
        offline=True,
    )
    assert printed.splitlines() == [
        "Run.log loss (step 3): 0.5",
        "Run.parent.log best: 1",
        "Run.log row: {'x': 1}",
        "Run.upload_file a.txt: not kept, this is no step of a pipeline",
        "{'loss': 0.5, 'row': {'x': 1}}",
        "This process is no step of a pipeline: MLP_RUN_DIR is not set.",
    ]
    assert list(step.code.iterdir()) == []


def test_processes_and_threads_of_a_step_may_all_log(step: Step) -> None:
    step.run(
        """
        import multiprocessing, threading
        from airflow_mlpipelines import Run

        run = Run.get_context()

        def log(number):
            for i in range(20):
                run.log("value", number)

        threads = [threading.Thread(target=log, args=(0,)) for _ in range(2)]
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=log, args=(1,)) for _ in range(2)]
        for one in processes + threads:
            one.start()
        for one in processes + threads:
            one.join()
        """
    )
    assert sorted(read_metrics(step.run_directory)["value"]) == [0] * 40 + [1] * 40


def test_a_name_that_is_not_there_says_what_is(step: Step) -> None:
    printed = step.run(
        """
        import airflow_mlpipelines
        from airflow_mlpipelines import Run

        def attempt(what):
            try:
                what()
            except (AttributeError, ImportError) as error:
                print(type(error).__name__, error)

        def definition():
            from airflow_mlpipelines import Pipeline

        def azure():
            from airflow_mlpipelines.azureml.core import Workspace

        attempt(definition)
        attempt(azure)
        attempt(lambda: airflow_mlpipelines.Pipelin)
        attempt(lambda: Run.get_context().input_datasets)
        attempt(lambda: Run.get_context().log_residuals)
        """
    )
    lines = printed.splitlines()
    assert "ImportError" in lines[0]
    assert "only Run is available inside a step's process" in lines[0]
    assert "ImportError" in lines[1]
    assert "Run is all" in lines[1]
    assert "has no attribute 'Pipelin'" in lines[2]
    assert "MLP_INPUT_<NAME>" in lines[3]
    assert "log_row" in lines[4]


def test_importing_run_imports_nothing_but_the_standard_library(step: Step) -> None:
    printed = step.run(
        """
        import sys
        before = set(sys.modules)
        from airflow_mlpipelines import Run
        files = [getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before]
        print([file for file in files if "site-packages" in file])
        """
    )
    assert printed.strip() == "[]"
