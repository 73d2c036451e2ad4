"""Pipelines inside DAGs of Airflow: what stands around them, what is skipped, what is ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines import (
    CommandStep,
    LocalCompute,
    Pipeline,
    PipelineData,
    PipelineParameter,
    Resources,
    Workspace,
)
from airflow_mlpipelines.compute import local
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from tests.dags.conftest import RunDag

pytestmark = [pytest.mark.airflow, pytest.mark.usefixtures("airflow_db")]


def chain(name: str, *, tag: str = "1") -> Pipeline:
    """Return a pipeline of three steps in a row."""
    steps, before = [], []
    for step in ("a", "b", "c"):
        out = PipelineData(step)
        command = ["sh", "-c", f"echo {name} {tag} > {out}"]
        steps.append(CommandStep(command, name=step, inputs=before, outputs=[out]))
        before = [out]
    return Pipeline(Workspace.from_config(), steps, name=name)


def states_of(run) -> dict[str, str]:
    return {ti.task_id: str(ti.state) for ti in run.get_task_instances()}


def branching(dag_id: str, taken: str):
    """Return a DAG that goes one of two ways; one is a pipeline, and ``deploy`` stands behind it."""
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.providers.standard.operators.python import BranchPythonOperator
    from airflow.sdk import DAG

    with DAG(dag_id, schedule=None) as dag:
        branch = BranchPythonOperator(task_id="branch", python_callable=lambda: taken)
        group = chain(dag_id).to_task_group(group_id="steps")
        branch >> group >> EmptyOperator(task_id="deploy")
        branch >> EmptyOperator(task_id="rest")
    return dag


def test_a_pipeline_on_a_branch_that_is_not_taken_is_skipped_with_what_follows(run_dag: RunDag):
    run = run_dag(branching("branch_away", "rest"))

    states = states_of(run)
    assert run.state == "success"
    assert states.pop("branch") == states.pop("rest") == "success"
    assert set(states.values()) == {"skipped"}


def test_a_pipeline_on_the_branch_that_is_taken_runs_with_what_follows(run_dag: RunDag):
    dag = branching("branch_along", "steps.cache_sensor")
    first = states_of(run_dag(dag))
    assert first.pop("rest") == "skipped"
    assert set(first.values()) == {"success"}

    again = states_of(run_dag(dag))

    assert again["steps.b"] == "skipped"  # reused
    assert again["deploy"] == "success"


def test_two_pipelines_in_one_dag_are_regenerated_each_for_itself(run_dag: RunDag):
    from airflow.sdk import DAG

    with DAG("two_pipelines", schedule=None) as dag:
        one = chain("one").to_task_group()
        two = chain("two").to_task_group()
        one >> two
    assert set(states_of(run_dag(dag)).values()) == {"success"}

    again = states_of(run_dag(dag, {"regenerate_outputs": ["one.b"]}))

    assert again["one.b"] == "success"
    assert (again["one.a"], again["one.c"], again["two.b"]) == ("skipped",) * 3


def test_a_parameter_of_the_dag_s_own_name_is_refused():
    from airflow.sdk import DAG, Param

    rate = PipelineParameter("rate", 0.5)
    step = CommandStep(["echo", rate], name="show")
    pipeline = Pipeline(Workspace.from_config(), [step], name="clash")

    with (
        DAG("own_param", schedule=None, params={"rate": Param(1.0, type="number")}),
        pytest.raises(DefinitionError, match=r"'rate'.* Rename"),
    ):
        pipeline.to_task_group()


def test_a_step_over_its_timeout_is_ended_with_all_that_it_started(run_dag: RunDag, tmp_path):
    beat = tmp_path / "beat"
    loop = f"while :; do date +%N > {beat}; sleep 0.05; done"
    step = CommandStep(["sh", "-c", f"setsid sh -c '{loop}' & wait"], name="endless", timeout=1)
    dag = Pipeline(Workspace.from_config(), [step], name="over_time").to_dag()

    run = run_dag(dag)

    assert run.state == "failed"
    before = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == before


def test_an_input_is_found_where_the_author_wants_it(run_dag: RunDag):
    from tests.dags.project import _xcom

    made, copied = PipelineData("made"), PipelineData("copied")
    make = CommandStep(["sh", "-c", f"echo here > {made}"], name="make", outputs=[made])
    show = CommandStep(
        ["sh", "-c", f"cp data/sub/made.txt {copied} && echo more >> data/sub/made.txt"],
        name="show",
        inputs=[made.as_download(path_on_compute="data/sub/made.txt")],
        outputs=[copied],
    )
    run = run_dag(Pipeline(Workspace.from_config(), [make, show], name="placed").to_dag())

    assert run.state == "success"
    uri = _xcom(run, "show", "copied")["uri"]
    assert Path(uri.removeprefix("file://")).read_text() == "here\n"


def test_a_failed_step_says_why(run_dag: RunDag):
    from tests.dags.project import _xcom

    step = CommandStep(["sh", "-c", "echo no luck; exit 7"], name="unlucky", allow_reuse=False)
    run = run_dag(Pipeline(Workspace.from_config(), [step], name="unlucky").to_dag())

    record = _xcom(run, "unlucky", "step_run")
    assert run.state == "failed"
    assert record["state"] == "failed"
    assert "exit code 7" in record["reason"]


def test_a_step_has_the_gpus_that_it_asks_for(run_dag: RunDag, monkeypatch, tmp_path):
    # Ids that no machine has: where it shows GPUs of its own, a workspace's others are left out.
    monkeypatch.setattr(local, "machine_gpus", list)
    monkeypatch.setenv("MLPIPELINES_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = LocalCompute("here", gpus=["GPU-6a1c", "GPU-77d0"])
    steps = [
        CommandStep(
            ["sh", "-c", f'echo "<$CUDA_VISIBLE_DEVICES>" > {tmp_path}/gpus-{count}'],
            name=f"takes_{count}",
            compute_target=here,
            resources=Resources(gpus=count),
        )
        for count in (0, 1, 2)
    ]

    run = run_dag(Pipeline(Workspace.from_config(), steps, name="with_gpus").to_dag())

    assert run.state == "success"
    seen = [(tmp_path / f"gpus-{count}").read_text().strip() for count in (0, 1, 2)]
    assert seen == ["<>", "<GPU-6a1c>", "<GPU-6a1c,GPU-77d0>"]


def test_gpus_that_the_worker_lacks_are_missed_before_anything_is_built(
    run_dag: RunDag, monkeypatch, capfd
):
    monkeypatch.setattr(local, "machine_gpus", list)
    built = []
    monkeypatch.setattr(local, "prepare_python", lambda *_, **__: built.append("environment"))
    step = CommandStep(["true"], name="train", resources=Resources(gpus=1))

    run = run_dag(Pipeline(Workspace.from_config(), [step], name="without_gpus").to_dag())

    assert run.state == "failed"
    assert not built
    assert "asks for 1 GPUs, but this worker" in capfd.readouterr().out


def test_the_run_s_summary_can_be_pulled_from_the_last_task(run_dag: RunDag):
    from airflow.sdk import DAG
    from airflow.sdk import task as make_task

    seen = []
    with DAG("summed_up", schedule=None) as dag:
        group = chain("summed_up").to_task_group(group_id="steps")

        @make_task
        def notify(ti=None):
            seen.append(ti.xcom_pull(task_ids="steps.finish"))

        group >> notify()
    run_dag(dag)
    run_dag(dag)

    counts = [(one["ran"], one["reused"]) for one in seen]
    assert counts == [(3, 0), (0, 3)]


def test_an_output_that_leads_out_of_the_outputs_is_refused(
    run_dag: RunDag, tmp_path: Path, capsys
):
    (tmp_path / "private").write_text("of somebody else")
    out = PipelineData("out", is_directory=False)
    step = CommandStep(["ln", "-s", str(tmp_path / "private"), out], name="link", outputs=[out])

    run = run_dag(Pipeline(Workspace.from_config(), [step], name="leads_out").to_dag())

    said = capsys.readouterr().out
    assert states_of(run)["link"] == "failed"
    assert "step 'link', output 'out': is a symbolic link that leads out of the outputs" in said
