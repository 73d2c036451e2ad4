"""The command line: ``mlpipelines``."""

from __future__ import annotations

import os
import sys

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_INFRASTRUCTURE = 3


def main() -> None:
    """Run the command that the arguments name; errors are told in words, without a traceback."""
    from airflow_mlpipelines.exceptions import (
        DefinitionError,
        EnvironmentBuildError,
        MLPipelinesError,
        StepFailedError,
    )

    # Airflow logs to standard output, which here is for what the command has to tell.
    os.environ.setdefault("AIRFLOW__LOGGING__LOGGING_LEVEL", "WARNING")
    try:
        from airflow_mlpipelines.cli.app import app

        app(args=join_regenerate(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except MLPipelinesError as error:
        if os.environ.get("MLPIPELINES_DEBUG"):
            raise
        notes = "".join(f"\n  ({note})" for note in getattr(error, "__notes__", ()))
        print(f"error: {error}{notes}", file=sys.stderr)
        if isinstance(error, DefinitionError):
            sys.exit(EXIT_USAGE)
        failed = isinstance(error, StepFailedError) or (
            isinstance(error, EnvironmentBuildError) and not error.retryable
        )
        sys.exit(EXIT_RUN_FAILED if failed else EXIT_INFRASTRUCTURE)


def join_regenerate(arguments: list[str]) -> list[str]:
    """Return the arguments with ``--regenerate [STEP…]`` as one option with one value.

    Alone it means every step; the steps after it go up to the next option or file.

    Example:
        >>> join_regenerate(["run", "--regenerate", "a", "b", "flights.py"])
        ['run', '--regenerate', 'a,b', 'flights.py']
        >>> join_regenerate(["run", "flights.py", "--regenerate"])
        ['run', 'flights.py', '--regenerate', 'all']
    """
    joined: list[str] = []
    position = 0
    while position < len(arguments):
        joined.append(arguments[position])
        position += 1
        if joined[-1] != "--regenerate":
            continue
        steps = []
        while position < len(arguments) and not _ends_steps(arguments[position]):
            steps.append(arguments[position])
            position += 1
        joined.append(",".join(steps) or "all")
    return joined


def _ends_steps(argument: str) -> bool:
    return argument.startswith("-") or argument.endswith(".py")
