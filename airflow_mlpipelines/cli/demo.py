"""The demo: the flights pipeline on a real Airflow, run twice, with two changes in between."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.cli import EXIT_OK, EXIT_RUN_FAILED
from airflow_mlpipelines.cli.stack import AirflowStack, find_detached, stop_detached
from airflow_mlpipelines.cli.tables import print_table, show_seconds
from airflow_mlpipelines.exceptions import SubmissionError

if TYPE_CHECKING:
    from types import FrameType

    from airflow_mlpipelines.definition.pipeline import Pipeline
    from airflow_mlpipelines.submission.rest import AirflowClient
    from airflow_mlpipelines.submission.run import PipelineRun, StepRun

_DAG = "flights"
_PORT = 8080
_PARSED_SECONDS = 60
_MARKER = ".made-by-mlpipelines-demo"
_EDITED = "evaluate.py"
_OLD_LOGIC = 'best = max(scores, key=lambda name: scores[name]["auc"])'
_NEW_LOGIC = 'best = max(scores, key=lambda name: scores[name]["average_precision"])'
_NEW_PARAMETERS = {"learning_rate": 0.2}


@dataclass(frozen=True)
class _Lap:
    """One run of the demo."""

    run: PipelineRun
    steps: list[StepRun]
    seconds: float
    state: str


def run_demo(home: Path, *, keep: bool = False) -> int:
    """Run the demo and return the exit code.

    Args:
        home: Where its Airflow keeps its things. What an earlier demo left there is removed.
        keep: Whether to leave Airflow running.

    Raises:
        SubmissionError: The home is somebody else's, or Airflow does not start.
    """
    started = time.monotonic()
    home = home.absolute()
    _prepare_home(home)
    stack = AirflowStack(home, home / "dags")
    _end_politely()
    try:
        _say(
            "Starting a real Airflow: api-server, scheduler, dag-processor, triggerer (SQLite, no Docker)"
        )
        stack.start(_say)
        client, pipeline = _connect(stack)
        _say("First run: 336,776 flights, two models side by side")
        first = _run_once(client, pipeline, {})
        _edit_script(home / "dags" / "flights" / _EDITED)
        _say(
            f"Changed: {_EDITED} now picks the model by average precision; learning_rate 0.1 -> 0.2. "
            "Second run:"
        )
        second = _run_once(client, pipeline, _NEW_PARAMETERS)
        _show(first, second)
        if keep:
            stack.detach()
            _say(
                f"Airflow goes on at {stack.url} (user {stack.username}, password {stack.password})."
            )
            _say("`mlpipelines down` stops it.")
    finally:
        stack.stop()
    _say(f"The demo took {time.monotonic() - started:.0f} s. Its files are in {home}.")
    return EXIT_OK if (first.state, second.state) == ("success", "success") else EXIT_RUN_FAILED


def start_detached(home: Path) -> None:
    """Start the demo's Airflow with the flights pipeline, and leave it running.

    Raises:
        SubmissionError: The home is somebody else's, or Airflow does not start.
    """
    home = home.absolute()
    running = find_detached(home)
    if running is not None:
        _say(f"Airflow is running at {running} already.")
        return
    if not (home / _MARKER).is_file():
        _prepare_home(home)
    stack = AirflowStack(home, home / "dags", port=_PORT if _is_free(_PORT) else None)
    stack.start(_say)
    client, _ = _connect(stack)
    client.unpause(_DAG)
    stack.detach()
    _say(f"Log in as {stack.username} with the password {stack.password}.")
    _say("`make down` (or `mlpipelines down`) stops it.")


def find_examples() -> Path:
    """Return the folder of the example DAGs: the package's own, or the checkout's.

    Raises:
        SubmissionError: There is none.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "example_dags", package.parent / "dags"):
        if (folder / "flights.py").is_file():
            return folder
    raise SubmissionError("the example DAGs are not there; run the demo from a checkout")


def _prepare_home(home: Path) -> None:
    if home.exists() and any(home.iterdir()) and not (home / _MARKER).is_file():
        raise SubmissionError(
            f"{home} is there and was not made by a demo; choose another folder with --home"
        )
    stop_detached(home)
    shutil.rmtree(home, ignore_errors=True)
    examples = find_examples()
    shutil.copytree(
        examples / "flights",
        home / "dags" / "flights",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(examples / "flights.py", home / "dags" / "flights.py")
    (home / _MARKER).touch()


def _connect(stack: AirflowStack) -> tuple[AirflowClient, Pipeline]:
    """Return a client for the server, and the pipeline, once the server knows its DAG."""
    os.environ |= {
        name: value for name, value in stack.environment.items() if name.startswith("AIRFLOW")
    }
    from airflow_mlpipelines.cli.files import load_pipeline
    from airflow_mlpipelines.submission.rest import AirflowClient

    client = AirflowClient(stack.url, username=stack.username, password=stack.password)
    pipeline = load_pipeline(stack.dags_folder / "flights.py", _DAG)
    deadline = time.monotonic() + _PARSED_SECONDS
    while client.find_dag(_DAG) is None:
        errors = client.list_import_errors()
        if errors or time.monotonic() > deadline:
            raise SubmissionError(f"Airflow does not find the DAG {_DAG!r}. {' '.join(errors)}")
        time.sleep(0.5)
    client.unpause(_DAG)
    return client, pipeline


def _run_once(client: AirflowClient, pipeline: Pipeline, parameters: dict[str, Any]) -> _Lap:
    from airflow_mlpipelines.submission.remote import submit_over_rest

    started = time.monotonic()
    run = submit_over_rest(pipeline, parameters, client=client)
    run.follow(_tell)
    seconds = time.monotonic() - started
    steps = run.get_steps()
    for step in steps:
        if step.state == "failed":
            _say(f"The end of the log of {step.task_id}:")
            for line in run.get_log(step.task_id)[-20:]:
                _say(f"  {line}")
    return _Lap(run, steps, seconds, run.summary()["state"])


def _edit_script(script: Path) -> None:
    text = script.read_text()
    if _OLD_LOGIC not in text:
        raise SubmissionError(f"{script} is not the one that this demo knows how to change")
    script.write_text(text.replace(_OLD_LOGIC, _NEW_LOGIC))


def _tell(step: StepRun) -> None:
    _say(f"  {step.state:<8} {step.task_id:<14} {show_seconds(step.seconds):>7}  {step.reason}")


def _show(first: _Lap, second: _Lap) -> None:
    saved = sum(step.seconds_saved for step in second.steps)
    print()
    print_table(
        ["step", "first run", "second run", "took", "saved", "why"],
        [
            (
                after.task_id,
                f"{before.state} {show_seconds(before.seconds)}",
                after.state,
                show_seconds(after.seconds),
                show_seconds(after.seconds_saved),
                after.reason,
            )
            for before, after in zip(first.steps, second.steps, strict=True)
        ],
    )
    reused = sum(step.state == "reused" for step in second.steps)
    print(
        f"\nFirst run {first.seconds:.1f} s, second run {second.seconds:.1f} s: {reused} of "
        f"{len(second.steps)} steps were reused, which saved {saved:.1f} s of work.",
        flush=True,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end_politely() -> None:
    """Let a SIGTERM end the demo as Ctrl-C does: with everything that it started."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
