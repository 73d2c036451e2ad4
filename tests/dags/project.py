"""A small project of real scripts on real files, run by Airflow's own ``dag.test()``."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines import (
    DataReference,
    Datastore,
    Pipeline,
    PipelineData,
    PipelineParameter,
    PythonScriptStep,
    Workspace,
)

if TYPE_CHECKING:
    from pathlib import Path

SCRIPTS = {
    "clean.py": """
        import argparse, json
        from helpers.text import tidy

        parser = argparse.ArgumentParser()
        parser.add_argument("--source")
        parser.add_argument("--target")
        args = parser.parse_args()
        with open(args.source) as source, open(args.target, "w") as target:
            target.write(tidy(source.read()))
        """,
    "helpers/__init__.py": "",
    "helpers/text.py": """
        from helpers.rules import SEPARATOR

        def tidy(text):
            return SEPARATOR.join(text.split())
        """,
    "helpers/rules.py": 'SEPARATOR = " "\n',
    "train.py": """
        import argparse, pathlib

        parser = argparse.ArgumentParser()
        parser.add_argument("--table")
        parser.add_argument("--model")
        parser.add_argument("--rate")
        parser.add_argument("--tag")
        args = parser.parse_args()
        table = pathlib.Path(args.table).read_text()
        words = pathlib.Path("words.txt").read_text().split()
        score = sum(table.count(word) for word in words) * float(args.rate)
        pathlib.Path(args.model).mkdir()
        pathlib.Path(args.model, "model.txt").write_text(f"{score} {args.tag}")
        """,
    "words.txt": "air port\n",
    "report.py": """
        import argparse, pathlib

        parser = argparse.ArgumentParser()
        parser.add_argument("--model")
        parser.add_argument("--report")
        args = parser.parse_args()
        text = pathlib.Path(args.model, "model.txt").read_text()
        pathlib.Path(args.report).write_text(f"the model says {text}")
        """,
}


@dataclass
class Outcome:
    """What one run did.

    Attributes:
        state: The run's state.
        steps: Each step's id and whether it ``ran``, was ``reused``, ``failed`` or was left out.
        reasons: Each step's id and the reason in words.
        outputs: Each step's id and its outputs, as they are in XCom.
    """

    state: str
    steps: dict[str, str]
    reasons: dict[str, str]
    outputs: dict[str, dict[str, Any]]

    @property
    def ran(self) -> set[str]:
        """Ids of the steps whose program ran."""
        return {step for step, state in self.steps.items() if state == "ran"}


@dataclass
class Project:
    """Three steps in one folder, ``clean`` -> ``train`` -> ``report``, on a file that is there before."""

    root: Path
    tag: str = "v1"
    environment: Any = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    data_path: str = "raw/flights.txt"

    def __post_init__(self) -> None:
        for name, text in SCRIPTS.items():
            self.write(name, textwrap.dedent(text).lstrip())
        self.write_data("air  port\nair plane\n")

    @property
    def data(self) -> Path:
        """The external data, on the datastore."""
        return self.root / "data" / self.data_path

    def write(self, name: str, text: str) -> None:
        """Write a file of the source directory."""
        path = self.root / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text in a file of the source directory; it has to be there."""
        path = self.root / "code" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def write_data(self, text: str) -> None:
        """Write the external data."""
        self.data.parent.mkdir(parents=True, exist_ok=True)
        self.data.write_text(text)

    def pipeline(self) -> Pipeline:
        """Return the pipeline, defined anew as a DAG file is parsed anew."""
        config = self.root / "mlpipelines.yaml"
        config.write_text(
            "name: test\ndefault_datastore: store\n"
            f"datastores:\n  store: {{url: 'file://{self.root}/data'}}\n"
            "computes:\n  local: {type: local}\n"
        )
        workspace = Workspace.from_config(config)
        raw = DataReference(
            Datastore(workspace, "store"),
            data_reference_name="raw",
            path_on_datastore=self.data_path,
        )
        table = PipelineData("table")
        model = PipelineData("model")
        report = PipelineData("report", pipeline_output_name="report")
        rate = PipelineParameter("rate", default_value=0.5)
        common: dict[str, Any] = {
            "source_directory": str(self.root / "code"),
            "compute_target": "local",
            "environment": self.environment,
        }
        clean = PythonScriptStep(
            "clean.py",
            arguments=["--source", raw, "--target", table],
            inputs=[raw],
            outputs=[table],
            **{**common, **self.options.get("clean", {})},
        )
        train = PythonScriptStep(
            "train.py",
            arguments=["--table", table, "--model", model, "--rate", rate, "--tag", self.tag],
            inputs=[table],
            outputs=[model],
            **{**common, **self.options.get("train", {})},
        )
        reporting = PythonScriptStep(
            "report.py",
            arguments=["--model", model, "--report", report],
            inputs=[model],
            outputs=[report],
            **{**common, **self.options.get("report", {})},
        )
        return Pipeline(workspace, [clean, train, reporting], name=f"project_{self.root.name}")

    def run(self, **conf: Any) -> Outcome:
        """Run the pipeline with these run parameters and return what happened."""
        return run_dag(self.pipeline().to_dag(), conf)


def run_dag(dag: Any, conf: dict[str, Any] | None = None) -> Outcome:
    """Run a DAG in this process and return what its steps did."""
    from airflow.dag_processing.collection import update_dag_parsing_results_in_db
    from airflow.serialization.serialized_objects import LazyDeserializedDAG
    from airflow.utils.session import create_session

    with create_session() as session:  # dag.test() knows DAGs of a bundle; this one is in none
        update_dag_parsing_results_in_db(
            "dags-folder", None, [LazyDeserializedDAG.from_dag(dag)], {}, None, set(), session
        )
    run = dag.test(run_conf=conf or {}, logical_date=None)
    plan = _xcom(run, "cache_sensor", "plan") or {"steps": {}}
    states, reasons, outputs = {}, {}, {}
    from airflow_mlpipelines.caching.decision import Decision, RunPlan

    decisions = RunPlan.from_dict(plan).steps if plan["steps"] else {}
    for ti in run.get_task_instances():
        if ti.task_id in ("cache_sensor", "finish"):
            continue
        record = _xcom(run, ti.task_id, "step_run")
        decision = decisions.get(ti.task_id)
        if record is not None:
            states[ti.task_id], reasons[ti.task_id] = record["state"], record["reason"]
            outputs[ti.task_id] = _xcom(run, ti.task_id, "return_value")
        elif decision is not None and decision.decision is Decision.REUSE:
            states[ti.task_id], reasons[ti.task_id] = "reused", decision.reason
            outputs[ti.task_id] = {k: v.to_dict() for k, v in decision.outputs.items()}
        else:
            states[ti.task_id] = str(ti.state)
    return Outcome(str(run.state), states, reasons, outputs)


def _xcom(run: Any, task_id: str, key: str) -> Any:
    """Return an XCom as the database has it."""
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        return session.scalar(
            select(XComModel.value).where(
                XComModel.dag_id == run.dag_id,
                XComModel.run_id == run.run_id,
                XComModel.task_id == task_id,
                XComModel.key == key,
            )
        )
