"""The agent's command line: ``python -m airflow_mlpipelines.agent stage|commit|keep JOB``, in the pod's workspace.

``stage`` may get a second file, with what else the worker has for the step; without it, it waits to be sent that.

``stage`` speaks in plain lines, which are its container's log; why it failed is in the container's termination
message. ``commit`` and ``keep`` speak to the worker that runs them: each line of theirs is a JSON object, ``{"say":
"…"}``, ``{"beat": 1}``, and at last ``{"result": {…}}`` or ``{"error": "…", "store": false}``, where ``store`` tells that
a datastore is to blame. On their stdin, a line from the worker has the datastores as it knows them now.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import airflow_mlpipelines
from airflow_mlpipelines.agent.committing import commit
from airflow_mlpipelines.agent.job import Job
from airflow_mlpipelines.agent.staging import CONTROL, stage
from airflow_mlpipelines.exceptions import DataError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

_USAGE = "usage: python -m airflow_mlpipelines.agent stage JOB [FILES] | commit JOB | keep JOB"
_FAILED, _MISUSED = 3, 2
_ARGUMENTS = {"stage": (1, 2), "commit": (1,), "keep": (1,)}
"""How many each takes."""
_BEAT_SECONDS = 10.0
_NEWER_SECONDS = 10.0
"""How long a worker may take to say what it knows of the datastores; one of an earlier release says nothing."""
_TERMINATION_LOG = Path("/dev/termination-log")
_LONGEST_MESSAGE = 3500
"""Bytes; Kubernetes keeps 4096 of a termination message."""
_speaking = threading.Lock()


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; return the exit code."""
    verb, *files = arguments or ("",)
    if len(files) not in _ARGUMENTS.get(verb, ()):
        print(_USAGE, file=sys.stderr)  # noqa: T201
        return _MISUSED
    workspace = Path.cwd()
    private = workspace / CONTROL / "agent"
    # Nothing of the image's own user counts: whoever the pod runs as has no home in it.
    os.environ["HOME"] = os.environ["AIRFLOW_HOME"] = str(private)
    if verb == "stage":
        return _stage(files, workspace, private)
    return _commit(verb, files[0], workspace)


def _stage(files: Sequence[str], workspace: Path, private: Path) -> int:
    signal.signal(signal.SIGTERM, _leave)  # the first process of a container has no default for it
    try:
        packed = Path(files[1]) if len(files) > 1 else None
        stage(_read(files[0]), workspace, say=_say_plainly, private=private, packed=packed)
    except DataError as error:
        _say_plainly(str(error))
        _note_failure(str(error))
        return _FAILED
    return 0


def _commit(verb: str, file: str, workspace: Path) -> int:
    over = threading.Event()
    threading.Thread(target=_beat, args=(over,), daemon=True).start()
    try:
        made = commit(
            _renew(_read(file)),
            workspace,
            say=lambda line: _answer({"say": line}),
            with_outputs=verb == "commit",
        )
    except DataError as error:
        _answer({"error": str(error), "store": isinstance(error, StoreError)})
        return _FAILED
    finally:
        over.set()
    _answer({"result": made})
    return 0


def _read(file: str) -> Job:
    return Job.from_json(
        Path(file).read_text(encoding="utf-8"), release=airflow_mlpipelines.__version__
    )


def _renew(job: Job) -> Job:
    """Return the job with the credentials that the worker has now; the pod may be older than they are."""
    if not select.select([sys.stdin], [], [], _NEWER_SECONDS)[0]:
        return job
    try:
        return job.renewed(json.loads(sys.stdin.readline()))
    except (ValueError, LookupError, TypeError, AttributeError):
        return job  # the connection broke; whoever asks next gets what is made


def _say_plainly(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _answer(message: dict[str, Any]) -> None:
    """Say something to the worker; if it has gone, the work goes on for the next one that asks."""
    with _speaking, suppress(OSError):
        print(json.dumps(message), flush=True)  # noqa: T201


def _beat(over: threading.Event) -> None:
    """Let the worker know that the connection is alive."""
    while not over.wait(_BEAT_SECONDS):
        _answer({"beat": 1})


def _note_failure(message: str) -> None:
    text = message
    while len(json.dumps({"error": text})) > _LONGEST_MESSAGE:
        text = f"{text[: len(text) * 3 // 4]}…"
    with suppress(OSError):
        _TERMINATION_LOG.write_text(json.dumps({"error": text}), encoding="ascii")


def _leave(*_: object) -> NoReturn:
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
    # Without waiting for what drivers leave running, or for a reader of stdout that is gone.
    os._exit(code)
