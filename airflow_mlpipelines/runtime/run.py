"""Run: what a step's program says of itself, in Azure ML's words.

    from airflow_mlpipelines import Run

    run = Run.get_context()
    run.log("accuracy", 0.93)

The same script works outside a pipeline: the run is then an offline one, which prints what is logged.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from airflow_mlpipelines.runtime import contract, metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, BinaryIO

    Source = str | os.PathLike[str] | BinaryIO

_START_DIRECTORY = os.getcwd()  # noqa: PTH109 - the step's working directory, before the script changes it
_KEPT = ("outputs", "logs")
_LATER = {
    "input_datasets": "Read the input's path from the script's arguments or MLP_INPUT_<NAME>.",
    "output_datasets": "Write to the output's path, from the script's arguments or MLP_OUTPUT_<NAME>.",
    "register_model": "Make the model an output of the step.",
}


class RunExperiment:
    """The experiment of a run: here, the pipeline that it belongs to.

    Attributes:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Experiment(name={self.name!r})"


class Run:
    """The run of one step, from inside. Get it with :meth:`get_context`.

    What is logged is on the disk when the call returns, so nothing has to be flushed or completed.

    Attributes:
        id: Identifies the run of the step.
        name: The step's name.
        experiment: The pipeline that it belongs to.
        parent: The run of the whole pipeline, which can be logged to in the same way; None for that
            run itself.
    """

    def __init__(
        self,
        directory: str,
        *,
        run_id: str,
        name: str,
        experiment: str,
        parent: Run | None = None,
        scope: str = metrics.STEP_RUN,
    ) -> None:
        self.id = run_id
        self.name = name
        self.experiment = RunExperiment(experiment)
        self.parent = parent
        self._directory = directory
        self._scope = scope

    @staticmethod
    def get_context(allow_offline: bool = True) -> Run:
        """Return the run that this process belongs to; outside a pipeline, an offline one.

        Args:
            allow_offline: Whether there may be no pipeline around.

        Raises:
            RuntimeError: There is none, and ``allow_offline`` is False.
        """
        variables = os.environ
        directory = variables.get(contract.RUN_DIRECTORY)
        if directory is None:
            if not allow_offline:
                raise RuntimeError(
                    f"This process is no step of a pipeline: {contract.RUN_DIRECTORY} is not set."
                )
            return _offline_run()
        experiment = variables.get(contract.PIPELINE, "")
        parent = Run(
            directory,
            run_id=variables.get(contract.PARENT_RUN_ID, ""),
            name=experiment,
            experiment=experiment,
            scope=metrics.PARENT_RUN,
        )
        return Run(
            directory,
            run_id=variables.get(contract.RUN_ID, ""),
            name=variables.get(contract.STEP, ""),
            experiment=experiment,
            parent=parent,
        )

    # ---- metrics ---------------------------------------------------------------------------

    def log(self, name: str, value: Any, description: str = "", step: int | None = None) -> None:
        """Log a number or a text. Logged again under the same name, it becomes a list of them."""
        self._append(metrics.SCALAR, name, value, description, step)

    def log_list(self, name: str, value: Iterable[Any], description: str = "") -> None:
        """Log a list of values."""
        self._append(metrics.LIST, name, list(value), description)

    def log_row(self, name: str, description: str | None = None, **kwargs: Any) -> None:
        """Log one row of a table: each column's name and value."""
        if not kwargs:
            raise ValueError(
                f"log_row({name!r}) needs columns, such as log_row({name!r}, x=1, y=2)"
            )
        self._append(metrics.ROW, name, kwargs, description)

    def log_table(
        self, name: str, value: Mapping[str, Iterable[Any]], description: str = ""
    ) -> None:
        """Log a whole table: each column's name and values; a value that is no list is a list of one."""
        table = {
            str(column): list(items)
            if hasattr(items, "__iter__") and not isinstance(items, str)
            else [items]
            for column, items in value.items()
        }
        self._append(metrics.TABLE, name, table, description)

    def log_image(
        self,
        name: str,
        path: str | None = None,
        plot: Any = None,
        description: str = "",
    ) -> None:
        """Keep an image with the run: a file, or a figure of Matplotlib.

        Raises:
            ValueError: Neither ``path`` nor ``plot`` is given, or both.
        """
        if (path is None) == (plot is None):
            raise ValueError("log_image() takes either path= or plot=")
        if path is not None:
            target = f"{_KEPT[0]}/{name}{Path(path).suffix}"
            self.upload_file(target, path)
        else:
            image = io.BytesIO()
            plot.savefig(image, format="png")
            image.seek(0)
            target = f"{_KEPT[0]}/{name}.png"
            self.upload_file(target, image)
        self._append(metrics.IMAGE, name, target, description)

    def get_metrics(self, name: str | None = None) -> dict[str, Any]:
        """Return what this run has logged so far: each metric's name and value."""
        found = metrics.read_metrics(self._directory, run=self._scope)
        return found if name is None else {key: found[key] for key in found if key == name}

    # ---- files -----------------------------------------------------------------------------

    def upload_file(self, name: str, path_or_stream: Source) -> None:
        """Keep a file with the run, as ``name``.

        Everything in ``./outputs`` and ``./logs`` is kept anyway. A name that starts with neither is
        put below ``outputs``.

        Args:
            name: Its relative path, with ``/``.
            path_or_stream: The file, or an open one to read bytes from.

        Raises:
            ValueError: ``name`` is no relative path, or leads out with ``..``.
        """
        target = _kept_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(path_or_stream, (str, os.PathLike)):
            _write_whole(path_or_stream, target)
            return
        source = Path(path_or_stream)
        if target.exists() and source.resolve() == target.resolve():
            return
        with source.open("rb") as stream:
            _write_whole(stream, target)

    def upload_folder(self, name: str, path: str | os.PathLike[str]) -> None:
        """Keep every file of a folder with the run, below ``name``."""
        root = Path(path)
        if not root.is_dir():
            raise NotADirectoryError(f"upload_folder() needs a folder, but {root} is none")
        for file in sorted(item for item in root.rglob("*") if item.is_file()):
            self.upload_file(f"{name}/{file.relative_to(root).as_posix()}", file)

    # ---- the run itself --------------------------------------------------------------------

    @property
    def display_name(self) -> str:
        """The name to show to people."""
        return self.name

    def flush(self, timeout_seconds: int = 300) -> None:
        """Return; what was logged has been written."""

    def complete(self) -> None:
        """Return; the run is complete when its program ends, by its exit code."""

    def __repr__(self) -> str:
        return f"Run(id={self.id!r}, name={self.name!r}, experiment={self.experiment.name!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        offered = [item for item in dir(Run) if not item.startswith("_")]
        remedy = _LATER.get(name, f"There are: {', '.join(offered)}.")
        raise AttributeError(f"A run has no {name!r} inside a step. {remedy}")

    def _append(
        self,
        kind: str,
        name: str,
        value: Any,
        description: str | None,
        step: int | None = None,
    ) -> None:
        metrics.append_metric(
            self._directory,
            kind,
            str(name),
            value,
            run=self._scope,
            description=description or None,
            step=step,
        )


class _OfflineRun(Run):
    """A run outside any pipeline: says what is logged, and keeps it in a temporary directory."""

    def _append(
        self,
        kind: str,
        name: str,
        value: Any,
        description: str | None,
        step: int | None = None,
    ) -> None:
        super()._append(kind, name, value, description, step)
        at = "" if step is None else f" (step {step})"
        own = "Run" if self._scope == metrics.STEP_RUN else "Run.parent"
        print(f"{own}.log {name}{at}: {value}", file=sys.stdout, flush=True)  # noqa: T201

    def upload_file(self, name: str, path_or_stream: Source) -> None:
        _kept_path(name)
        print(f"Run.upload_file {name}: not kept, this is no step of a pipeline", flush=True)  # noqa: T201


_offline: _OfflineRun | None = None


def _offline_run() -> Run:
    """Return the one offline run of this process."""
    global _offline  # noqa: PLW0603
    if _offline is None:
        directory = tempfile.mkdtemp(prefix="mlpipelines-offline-")
        import atexit

        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        run_id = f"OfflineRun_{uuid.uuid4()}"
        _offline = _OfflineRun(
            directory,
            run_id=run_id,
            name="offline",
            experiment="offline",
            parent=_OfflineRun(
                directory,
                run_id=f"{run_id}_parent",
                name="offline",
                experiment="offline",
                scope=metrics.PARENT_RUN,
            ),
        )
    return _offline


def _kept_path(name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise ValueError(
            f"{name!r} is no relative path inside the run; name it such as 'outputs/a.txt'"
        )
    if parts[0] not in _KEPT or len(parts) == 1:
        parts = (_KEPT[0], *parts)
    return Path(_START_DIRECTORY, *parts)


def _write_whole(stream: BinaryIO, target: Path) -> None:
    """Write ``target`` from a stream; whoever looks finds all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=str(target.parent), prefix=".upload-")
    try:
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(stream, file)
        os.chmod(temporary, 0o644)  # noqa: PTH101
        os.replace(temporary, target)  # noqa: PTH105
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108
        raise
