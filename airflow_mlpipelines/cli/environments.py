"""``mlpipelines environment``: what the environments of a pipeline come down to, and building them now."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airflow_mlpipelines.cli.environment_uses import EnvironmentUse, choose, load_uses
from airflow_mlpipelines.cli.options import JsonOption, PipelineOption

if TYPE_CHECKING:
    from airflow_mlpipelines.compute.base import BuildGuard, Launcher, ResolvedEnvironment
    from airflow_mlpipelines.compute.built_images import ImageDefinition

environment_app = typer.Typer(
    no_args_is_help=True,
    help="Look at the environments of a pipeline or a workspace, build and export them.",
)
ChoiceOption = Annotated[
    str | None,
    typer.Option("--environment", "-e", help="Only this one: its name, or that of a step on it."),
]
WhereArgument = Annotated[
    Path,
    typer.Argument(
        help="A Python file that makes a pipeline; or a workspace file, or a directory with one."
    ),
]
ComputeOption = Annotated[
    str | None,
    typer.Option("--compute", help="On this compute; for a workspace, its default one."),
]
_SHOWN_DIGEST = 24


@environment_app.command("ls")
def list_environments(
    file: WhereArgument = Path(),
    pipeline: PipelineOption = None,
    compute: ComputeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the environments of a pipeline or a workspace: what each is on its compute, and whether it is there."""
    found = [_look_at(use) for use in load_uses(file, pipeline=pipeline, compute=compute)]
    if as_json:
        _print_json(found)
        return
    from airflow_mlpipelines.cli.tables import print_table

    print_table(
        ["environment", "compute", "state", "what it is", "steps"],
        [
            (
                item["environment"],
                item["compute"],
                item["state"],
                _summary(item),
                ", ".join(item["steps"]),
            )
            for item in found
        ],
    )


@environment_app.command("show")
def show_environment(
    file: WhereArgument = Path(),
    environment: ChoiceOption = None,
    pipeline: PipelineOption = None,
    compute: ComputeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what environments are made of: packages, bases by digest, Dockerfile."""
    found = [
        _look_at(use, whole=True)
        for use in choose(load_uses(file, pipeline=pipeline, compute=compute), environment)
    ]
    if as_json:
        _print_json(found)
        return
    for item in found:
        dockerfile = item.pop("dockerfile", None)
        for key, value in item.items():
            if isinstance(value, dict):
                print(f"{key}:" if value else f"{key}: none")
                for name, text in value.items():
                    print(f"  {name}  {text}")
            elif value is not None:
                print(f"{key}: {', '.join(value) if isinstance(value, (list, tuple)) else value}")
        if dockerfile is not None:
            print("dockerfile:")
            print("".join(f"  {line}\n" for line in dockerfile.splitlines()))


@environment_app.command("build")
def build_environments(
    file: WhereArgument = Path(),
    environment: ChoiceOption = None,
    pipeline: PipelineOption = None,
    compute: ComputeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make environments ready now: build them, or pull their images. The log goes to standard error."""
    made: list[dict[str, Any]] = []
    guard = _make_guard()
    for use in choose(load_uses(file, pipeline=pipeline, compute=compute), environment):
        launcher, resolved = _resolve(use)
        launcher.build_guard = guard
        began = time.monotonic()
        ready = launcher.prepare_environment(use.spec, resolved, emit=_tell)
        made.append(
            {
                "environment": use.title,
                "compute": use.compute.name,
                "image": ready.image,
                "python": ready.python,
                "digest": ready.digest,
                "seconds": round(time.monotonic() - began, 3),
            }
        )
    if as_json:
        _print_json(made)
        return
    from airflow_mlpipelines.cli.tables import print_table, show_seconds

    print_table(
        ["environment", "compute", "what runs", "took"],
        [
            (
                item["environment"],
                item["compute"],
                item["image"] or item["python"],
                show_seconds(item["seconds"]),
            )
            for item in made
        ],
    )


@environment_app.command("export")
def export_environment(
    file: WhereArgument,
    directory: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    environment: ChoiceOption = None,
    pipeline: PipelineOption = None,
    compute: ComputeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write what an environment is made from into a directory: a Dockerfile with its files, or a lock."""
    from airflow_mlpipelines._naming import list_options
    from airflow_mlpipelines.exceptions import DefinitionError

    uses = choose(load_uses(file, pipeline=pipeline, compute=compute), environment)
    made = [use for use in uses if use.is_built]
    if not made:
        raise DefinitionError(
            f"none of {list_options([use.title for use in uses])} is made from a definition: they are there as they are"
        )
    if len(made) > 1:
        names = [use.title for use in made]
        raise DefinitionError(f"choose one with --environment, of {list_options(names)}")
    use = made[0]
    definition = _define(use)
    if definition is None:
        image, commands = None, _export_lock(use, directory)
    else:
        definition.context.write(directory)
        image = definition.name
        commands = [f"docker tag {i} {name}" for i, name in definition.local_bases.items()]
        commands.append(f"docker build -t {definition.name} {directory}")
    if as_json:
        _print_json({"environment": use.title, "image": image, "directory": str(directory)})
        return
    for command in commands:
        print(command)


def _export_lock(use: EnvironmentUse, directory: Path) -> list[str]:
    """Write what an environment on this machine was resolved to; return the commands that make it elsewhere."""
    from airflow_mlpipelines.compute.environment_locks import find_lock

    return find_lock(use.spec).export(directory) if use.spec is not None else []


# ---- what they are -----------------------------------------------------------------------------


def _resolve(use: EnvironmentUse) -> tuple[Launcher, ResolvedEnvironment]:
    from airflow_mlpipelines.compute.launchers import make_launcher

    launcher = make_launcher(use.compute)
    return launcher, launcher.resolve_environment(use.spec)


def _make_guard() -> BuildGuard:
    from airflow_mlpipelines.caching.index import MetadataIndex
    from airflow_mlpipelines.execution.build_leases import make_build_guard
    from airflow_mlpipelines.operators.connections import metadata_url

    holder = f"`mlpipelines environment build` on {socket.gethostname()} (process {os.getpid()})"
    return make_build_guard(MetadataIndex(metadata_url()), holder)


def _define(use: EnvironmentUse) -> ImageDefinition | None:
    """Return the image that is built for it, or None if none is."""
    from airflow_mlpipelines.compute.launchers import make_launcher

    if use.spec is None or not use.is_built or use.compute.type == "local":
        return None
    return make_launcher(use.compute).define_image(use.spec)


def _look_at(use: EnvironmentUse, *, whole: bool = False) -> dict[str, Any]:
    """Return what is known of an environment, in its JSON form; what is wrong with it is one line of that."""
    from airflow_mlpipelines.exceptions import MLPipelinesError

    about: dict[str, Any] = {
        "environment": use.title,
        "compute": use.compute.name,
        "steps": list(use.steps),
        "state": "wrong",
        "kind": None,
        "image": None,
        "python": None,
        "digest": None,
        "problem": None,
    }
    try:
        launcher, resolved = _resolve(use)
        there = launcher.is_prepared(use.spec, resolved)
        definition = _define(use) if whole else None
    except MLPipelinesError as error:
        return {**about, "problem": str(error)}
    description = resolved.description
    missing = "not built" if use.is_built else "not pulled"
    about |= {
        "state": "unknown" if there is None else "ready" if there else missing,
        "kind": description["kind"],
        "image": description.get("image"),
        "python": description.get("python"),
        "digest": description.get("digest") or resolved.digest,
        "problem": resolved.problem,
    }
    if whole:
        about["packages"] = dict(description.get("packages") or {})
    if definition is not None:
        about["dockerfile"] = definition.context.dockerfile
    return about


def _summary(item: dict[str, Any]) -> str:
    if item["problem"] is not None:
        return str(item["problem"]).partition("\n")[0]
    if item["kind"] == "python":
        return f"Python {item['python']}, {item['digest'][:12]}"
    if item["digest"].startswith("definition:"):  # its name says the same
        return str(item["image"])
    return f"{item['image']}, {item['digest'][:_SHOWN_DIGEST]}"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_json(data: Any) -> None:
    from airflow_mlpipelines.cli.files import print_json

    print_json(data)
