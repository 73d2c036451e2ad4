"""The commands of ``mlpipelines``. What they need is imported when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airflow_mlpipelines.cli import EXIT_RUN_FAILED
from airflow_mlpipelines.cli.environments import environment_app
from airflow_mlpipelines.cli.options import (
    FileArgument,
    JsonOption,
    ParametersOption,
    PipelineOption,
    RegenerateOption,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_mlpipelines.definition.graph import PipelineGraph
    from airflow_mlpipelines.submission.run import PipelineRun, StepRun

app = typer.Typer(
    name="mlpipelines",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Machine-learning pipelines on Apache Airflow.\n\n"
        "Exit codes: 0 all is well; 1 a run, a check or a build failed; 2 the command or a pipeline is written "
        "wrongly; 3 something around it (a server, a database, a store) does not work.\n\n"
        "Set MLPIPELINES_DEBUG=1 to see tracebacks."
    ),
)
cache_app = typer.Typer(no_args_is_help=True, help="Look at what is remembered.")
app.add_typer(cache_app, name="cache")
app.add_typer(environment_app, name="environment")


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Python files that make pipelines.")],
    as_json: JsonOption = False,
) -> None:
    """Check pipelines: everything that can be known before a run."""
    from airflow_mlpipelines.cli.files import load_pipelines, print_json
    from airflow_mlpipelines.exceptions import PipelineCheckError

    results: list[dict[str, Any]] = []
    for file in files:
        try:
            checked = [(pipeline.name, pipeline.validate()) for pipeline in load_pipelines(file)]
        except PipelineCheckError as error:  # the file makes a DAG of it, as DAG files do
            checked = [(error.pipeline, list(error.problems))]
        for name, problems in checked:
            texts = [str(problem) for problem in problems]
            results.append({"file": str(file), "pipeline": name, "problems": texts})
    failed = any(result["problems"] for result in results)
    if as_json:
        print_json(results)
    else:
        for result in results:
            found = result["problems"]
            count = f"{len(found)} problem{'s' if len(found) != 1 else ''}" if found else "fine"
            print(f"{result['pipeline']}: {count}")
            for problem in found:
                print(f"  - {problem}")
    raise typer.Exit(EXIT_RUN_FAILED if failed else 0)


@app.command()
def graph(
    file: FileArgument,
    pipeline: PipelineOption = None,
    form: Annotated[str, typer.Option("--format", help="text, mermaid or json.")] = "text",
) -> None:
    """Show a pipeline's steps and the data between them."""
    from airflow_mlpipelines.cli.drawing import draw_mermaid, draw_text
    from airflow_mlpipelines.cli.files import load_pipeline

    drawn = load_pipeline(file, pipeline).graph
    forms: dict[str, Callable[[PipelineGraph], str]] = {
        "text": draw_text,
        "mermaid": draw_mermaid,
        "json": lambda item: item.model_dump_json(indent=2),
    }
    if form not in forms:
        raise typer.BadParameter(f"{form!r} is none of {', '.join(forms)}", param_hint="--format")
    print(forms[form](drawn))


@app.command()
def plan(
    file: FileArgument,
    parameter: ParametersOption = None,
    pipeline: PipelineOption = None,
    regenerate: RegenerateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which steps a run would reuse, which it would run, and why. Nothing runs."""
    from airflow_mlpipelines.cli.files import (
        load_pipeline,
        parse_parameters,
        parse_regenerate,
        print_json,
    )
    from airflow_mlpipelines.cli.planning import plan_pipeline

    chosen = load_pipeline(file, pipeline)
    made = plan_pipeline(
        chosen, parse_parameters(chosen, parameter or ()), parse_regenerate(chosen, regenerate)
    )
    names = {step.id: step.name for step in chosen.graph.steps}
    if as_json:
        steps = [
            {
                "name": names[step_id],
                "task_id": step_id,
                "decision": str(decision.decision),
                "reason": decision.reason,
                "seconds": decision.seconds_saved or 0.0,
                "outputs": {key: item.to_dict() for key, item in decision.outputs.items()},
            }
            for step_id, decision in made.steps.items()
        ]
        print_json({"dag_id": chosen.dag_id, "steps": steps})
        return
    from airflow_mlpipelines.cli.tables import print_table, show_seconds

    print_table(
        ["step", "decision", "why", "saves"],
        [
            (step_id, decision.decision, decision.reason, show_seconds(decision.seconds_saved))
            for step_id, decision in made.steps.items()
        ],
    )


@app.command()
def run(
    file: FileArgument,
    parameter: ParametersOption = None,
    pipeline: PipelineOption = None,
    regenerate: RegenerateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a pipeline in this process, with Airflow's own dag.test()."""
    from airflow_mlpipelines.cli.files import load_pipeline, parse_parameters, parse_regenerate
    from airflow_mlpipelines.submission.experiment import make_conf
    from airflow_mlpipelines.submission.local import run_in_process, settle_airflow

    if "airflow.configuration" not in sys.modules:  # to_dag() in the file is going to import it
        settle_airflow()
    chosen = load_pipeline(file, pipeline)
    conf = make_conf(
        parse_parameters(chosen, parameter or ()), parse_regenerate(chosen, regenerate)
    )
    _show_run(run_in_process(chosen, conf), as_json=as_json)


@app.command()
def submit(
    file: FileArgument,
    parameter: ParametersOption = None,
    pipeline: PipelineOption = None,
    regenerate: RegenerateOption = None,
    as_json: JsonOption = False,
    follow: Annotated[bool, typer.Option(help="Wait until the run is over.")] = True,
) -> None:
    """Start a run on the Airflow server of $AIRFLOW_API_URL, and follow it.

    The server has to have the file in its DAG folder. $AIRFLOW_API_TOKEN, or $AIRFLOW_API_USERNAME and
    $AIRFLOW_API_PASSWORD, log in.
    """
    from airflow_mlpipelines.cli.files import (
        load_pipeline,
        parse_parameters,
        parse_regenerate,
        print_json,
    )
    from airflow_mlpipelines.submission.experiment import make_conf
    from airflow_mlpipelines.submission.remote import submit_over_rest
    from airflow_mlpipelines.submission.rest import AirflowClient

    chosen = load_pipeline(file, pipeline)
    conf = make_conf(
        parse_parameters(chosen, parameter or ()), parse_regenerate(chosen, regenerate)
    )
    started = submit_over_rest(chosen, conf, client=AirflowClient.from_environment())
    if not follow:
        if as_json:
            print_json({"dag_id": started.dag_id, "run_id": started.id})
        else:
            print(f"{started.dag_id}: started {started.id}")
        return
    started.follow(_tell)
    _show_run(started, as_json=as_json)


@app.command()
def explain(
    dag_id: Annotated[str, typer.Argument(help="The DAG.")],
    step: Annotated[str, typer.Argument(help="The step's id.")],
    run_id: Annotated[str | None, typer.Option(help="Which run; by default the newest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show why a step ran or was reused: what differed from the nearest earlier run."""
    from airflow_mlpipelines.cli.files import print_json
    from airflow_mlpipelines.cli.history import explain_step

    explained = explain_step(dag_id, step, run_id)
    if as_json:
        print_json(explained)
        return
    print(
        f"{explained['step']} {explained['state']} in {explained['run_id']}: {explained['reason']}"
    )
    if explained["compared_with"]:
        print(f"Compared with {explained['compared_with']}:")
    for difference in explained["differences"]:
        print(f"  - {difference}")


@cache_app.command("ls")
def cache_ls(
    pipeline: Annotated[str | None, typer.Option(help="Of this pipeline only.")] = None,
    step: Annotated[str | None, typer.Option(help="Of this step only.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List what is remembered, newest first."""
    from airflow_mlpipelines.cli.files import print_json
    from airflow_mlpipelines.cli.history import entry_to_dict, open_index

    entries = open_index().list_entries(pipeline=pipeline, step=step, limit=limit)
    if as_json:
        print_json([entry_to_dict(entry) for entry in entries])
        return
    from airflow_mlpipelines._units import show_size
    from airflow_mlpipelines.cli.tables import print_table, show_seconds

    print_table(
        ["key", "pipeline", "step", "made", "took", "size"],
        [
            (
                entry.fingerprint[:12],
                entry.pipeline,
                entry.step,
                f"{entry.created_at:%Y-%m-%d %H:%M}",
                show_seconds(entry.seconds),
                show_size(sum(artifact.size for artifact in entry.outputs.values())),
            )
            for entry in entries
        ],
    )


@cache_app.command("show")
def cache_show(
    key: Annotated[str, typer.Argument(help="The key, or the first digits of it.")],
    as_json: JsonOption = False,
) -> None:
    """Show one entry: what it was made of, and where its outputs are."""
    from airflow_mlpipelines.cli.files import print_json
    from airflow_mlpipelines.cli.history import entry_to_dict, open_index

    entry = entry_to_dict(open_index().get_entry(key))
    if as_json:
        print_json(entry)
        return
    from rich.console import Console
    from rich.pretty import Pretty

    Console().print(Pretty(entry, expand_all=True))


@app.command()
def demo(
    home: Annotated[
        Path, typer.Option(help="Where the demo's Airflow keeps its things; emptied first.")
    ] = Path(".airflow"),
    keep: Annotated[bool, typer.Option(help="Leave Airflow and its UI running.")] = False,
) -> None:
    """Run the flights pipeline on a real Airflow, change two things, and run it again."""
    from airflow_mlpipelines.cli.demo import run_demo

    raise typer.Exit(run_demo(home, keep=keep))


@app.command()
def up(home: Annotated[Path, typer.Option(help="Its home.")] = Path(".airflow")) -> None:
    """Start the demo's Airflow and leave it running, with its UI."""
    from airflow_mlpipelines.cli.demo import start_detached

    start_detached(home)


@app.command()
def down(home: Annotated[Path, typer.Option(help="Its home.")] = Path(".airflow")) -> None:
    """Stop what `up` started."""
    from airflow_mlpipelines.cli.stack import stop_detached

    print("stopped" if stop_detached(home.absolute()) else "nothing was running")


def _tell(step: StepRun) -> None:
    """Report a step on standard error, which is for people."""
    seconds = f"{step.seconds:.1f} s" if step.state == "ran" else ""
    print(
        f"{step.state:<11} {step.task_id:<24} {seconds:>8}  {step.reason}",
        file=sys.stderr,
        flush=True,
    )


def _show_run(finished: PipelineRun, *, as_json: bool) -> None:
    from airflow_mlpipelines.cli.files import print_json

    summary = finished.summary()
    if as_json:
        print_json(summary)
    else:
        from airflow_mlpipelines.cli.tables import print_table, show_seconds

        print_table(
            ["step", "state", "took", "why"],
            [
                (step["task_id"], step["state"], show_seconds(step["seconds"]), step["reason"])
                for step in summary["steps"]
            ],
        )
        saved = sum(step.seconds_saved for step in finished.get_steps())
        print(
            f"{finished.dag_id}: {summary['state']}. Reuse saved {show_seconds(saved) or 'nothing'}."
        )
    raise typer.Exit(0 if summary["state"] == "success" else EXIT_RUN_FAILED)
