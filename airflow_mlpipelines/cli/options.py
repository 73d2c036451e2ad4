"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FileArgument = Annotated[Path, typer.Argument(help="A Python file that makes a pipeline.")]
PipelineOption = Annotated[
    str | None, typer.Option("--pipeline", help="Which pipeline, where the file makes several.")
]
ParametersOption = Annotated[
    list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Repeatable.")
]
RegenerateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--regenerate",
        metavar="[STEP,…]",
        help="Run these steps whatever is remembered; alone, or 'all': every step.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The last line of output is JSON.")]
