"""Who has which GPU of this machine: a file with a lock for each one, and a queue of those that wait.

A lock (``flock``) lasts as long as any process has the file open that it was taken through, and the
kernel ends it with the last of them, however that one died. So it is opened by the worker, and is
inherited by the guardian and by the program with all that it starts: as long as one of them lives, the
GPU is in use. Nobody ever unlocks: that would unlock it for all of them.

Every look at the queue, and every try to take GPUs, is made under one more lock, the turnstile. A ticket
in the queue is a file that whoever waits keeps locked; one that can be locked is that of a dead process.
Whoever is first gets the next GPUs. So a step that needs several is not passed by for ever by steps
that need one, at the price of GPUs that are free while it waits for the others.

A container does not inherit files, and outlives its worker. So of a GPU that is for a container, the file
says for which one, and who finds the lock free asks the daemon whether that container still runs.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from airflow_mlpipelines import settings
from airflow_mlpipelines.compute.container_use import is_used
from airflow_mlpipelines.compute.lock_files import lock_file, read_facts, write_facts
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.compute.gpus import Gpu

_FIRST_PAUSE, _PAUSE_IN_FRONT, _PAUSE_BEHIND = 0.02, 0.1, 0.5
_SAY_AGAIN_SECONDS = 30.0
_SHOWN = 8
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_PRIVATE = 0o700
_TAKE_OVER_SECONDS = 5.0


@dataclass(frozen=True)
class Containers:
    """The containers of one step that GPUs are for.

    Attributes:
        daemon: The socket of their daemon.
        names: Their names.
    """

    daemon: Path
    names: tuple[str, ...]


class Claim:
    """GPUs that are this step's alone until it, and every process that inherited ``files``, has let go.

    Those of containers are theirs until they have ended, unless the block that this is the context of ends
    well, or because the step has failed: then they have.

    Attributes:
        gpus: The GPUs; none if the step asked for none.
        files: The open files that their locks are held through.
    """

    def __init__(
        self, gpus: Sequence[Gpu] = (), files: Sequence[int] = (), *, for_containers: bool = False
    ) -> None:
        self.gpus = tuple(gpus)
        self.files = tuple(files)
        self._for_containers = for_containers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        files, self.files = self.files, ()
        is_over = kind is None or issubclass(kind, StepFailedError)
        for file in files:
            if self._for_containers and is_over:
                os.ftruncate(file, 0)
            os.close(file)


class GpuQueue:
    """One step's place among those of this machine that want GPUs.

    Args:
        gpus: Those of its compute; any of them will do.
        count: How many of them it needs; at least 1, and no more than there are.
        step: Its name, for those that have to wait for it.
        step_run_id: Likewise.
        containers: Whom they are for, where it is not a process that inherits the open files.

    Raises:
        ComputeUnavailableError: The directory of the locks can't be made.
    """

    def __init__(
        self,
        gpus: Sequence[Gpu],
        count: int,
        *,
        step: str,
        step_run_id: str,
        containers: Containers | None = None,
    ) -> None:
        self._gpus = gpus
        self._count = count
        self._containers = containers
        self._owner: dict[str, object] = {
            "step": step,
            "step_run": step_run_id,
            "process": os.getpid(),
        }
        self._directory = settings.gpu_lock_directory()
        self._tickets = self._directory / "queue"
        try:
            self._tickets.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        except OSError as error:
            raise ComputeUnavailableError(
                f"The directory for the locks of GPUs can't be made: {error}. Name one that this worker may "
                f"write to in {settings.GPU_LOCKS_VARIABLE}; all workers of a machine need the same one."
            ) from error
        self._number = 0
        self._ticket: int | None = None
        self._is_behind = False

    def wait(self, *, emit: Emit, cancelled: Callable[[], bool]) -> Claim | None:
        """Return the GPUs as soon as they are free and it is this step's turn.

        Says whom it waits for, at once, and again when that has changed. Returns None within half a
        second once ``cancelled`` says so.
        """
        started = time.monotonic()
        said, pause, say_from = "", _FIRST_PAUSE, started
        try:
            while not cancelled():
                outcome = self._try()
                now = time.monotonic()
                if isinstance(outcome, Claim):
                    if said:
                        emit(f"Got its GPUs after {now - started:.1f} s")
                    return outcome
                if outcome not in ("", said) and now >= say_from:
                    emit(outcome)
                    said, say_from = outcome, now + _SAY_AGAIN_SECONDS
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_BEHIND if self._is_behind else _PAUSE_IN_FRONT)
        finally:
            self._leave()
        return None

    def take_over(self) -> Claim:
        """Return the GPUs, which containers that an earlier worker has started run with already.

        One that is still locked is that worker's, who is about to end.
        """
        deadline = time.monotonic() + _TAKE_OVER_SECONDS
        while (turnstile := lock_file(self._directory / "turnstile")) is None:
            if time.monotonic() > deadline:
                return Claim(self._gpus)
            time.sleep(_FIRST_PAUSE)
        try:
            files = []
            for gpu in self._gpus:
                file = lock_file(self._file_of(gpu))
                if file is not None:
                    self._sign(gpu, file)
                    files.append(file)
        finally:
            os.close(turnstile)
        return Claim(self._gpus, files, for_containers=True)

    def _try(self) -> Claim | str:
        """Return the GPUs, or whom they have to be waited for; empty if somebody else is looking."""
        with ExitStack() as files:
            turnstile = lock_file(self._directory / "turnstile")
            if turnstile is None:
                return ""
            files.callback(os.close, turnstile)
            ahead = list(self._ahead())
            self._is_behind = bool(ahead)
            if not ahead:
                claim = self._take()
                if claim is not None:
                    return claim
            if self._ticket is None:
                self._queue_up()
            return self._describe(ahead)

    def _take(self) -> Claim | None:
        taken: list[tuple[Gpu, int]] = []
        try:
            for gpu in self._gpus:
                file = lock_file(self._file_of(gpu))
                if file is None:
                    continue
                if self._container_user(gpu):
                    os.close(file)
                    continue
                taken.append((gpu, file))
                if len(taken) == self._count:
                    break
        except BaseException:
            _close(file for _, file in taken)
            raise
        if len(taken) < self._count:
            _close(file for _, file in taken)
            return None
        for gpu, file in taken:
            self._sign(gpu, file)
        return Claim(
            [gpu for gpu, _ in taken],
            [file for _, file in taken],
            for_containers=self._containers is not None,
        )

    def _sign(self, gpu: Gpu, file: int) -> None:
        """Write who has a GPU: for people, and to be asked after where it is a container."""
        owner = self._owner
        if self._containers is not None:
            daemon, names = self._containers.daemon, self._containers.names
            owner = {**owner, "daemon": str(daemon), "containers": names, "gpu": gpu.id}
        write_facts(file, owner)

    def _container_user(self, gpu: Gpu) -> str:
        """Return who uses a GPU that nobody has locked: containers without a worker; empty if none does."""
        path = self._file_of(gpu)
        said = read_facts(path)
        daemon, names, device = said.get("daemon"), said.get("containers"), said.get("gpu")
        if (
            not isinstance(daemon, str)
            or not isinstance(names, list)
            or not isinstance(device, str)
        ):
            return ""
        used = is_used(Path(daemon), names, device)
        if used is None:
            return (
                f"{_name(said)} unless its container is gone, which the Docker daemon at {daemon} does not say: "
                f"if it is, remove {path}"
            )
        return f"{_name(said)} in a container that its worker has left" if used else ""

    def _queue_up(self) -> None:
        numbers = [int(ticket.name) for ticket in _numbered(self._tickets)]
        self._number = max(numbers, default=0) + 1
        ticket = lock_file(self._tickets / str(self._number))
        if ticket is not None:
            self._ticket = ticket
            write_facts(ticket, {**self._owner, "keys": [gpu.key for gpu in self._gpus]})

    def _ahead(self) -> Iterator[dict[str, object]]:
        """Yield whoever came before, is alive, and waits for any of the same GPUs; the first one first."""
        own = {gpu.key for gpu in self._gpus}
        for ticket in _numbered(self._tickets):
            if self._ticket is not None and int(ticket.name) >= self._number:
                return
            file = lock_file(ticket)
            if file is None:
                said = read_facts(ticket)
                keys = said.get("keys")
                if isinstance(keys, list) and own.intersection(keys):
                    yield said
                continue
            with suppress(OSError):
                ticket.unlink()
            os.close(file)

    def _leave(self) -> None:
        if self._ticket is not None:
            with suppress(OSError):
                (self._tickets / str(self._number)).unlink()
            os.close(self._ticket)
            self._ticket = None

    def _file_of(self, gpu: Gpu) -> Path:
        return self._directory / f"{_UNSAFE.sub('_', gpu.key)}.lock"

    def _describe(self, ahead: Sequence[dict[str, object]]) -> str:
        wanted = f"Waiting for {self._count} of the {len(self._gpus)} GPUs of this compute"
        if ahead:
            return f"{wanted}, after {_join(map(_name, ahead))}"
        held = []
        for gpu in self._gpus:
            path = self._file_of(gpu)
            file = lock_file(path)
            if file is None:
                holder = _name(read_facts(path))
            else:
                holder = self._container_user(gpu)
                os.close(file)
            if holder:
                held.append(f"GPU {gpu.id} is held by {holder}")
        return f"{wanted}: {_join(held)}" if held else ""


def _close(files: Iterator[int]) -> None:
    for file in files:
        os.close(file)


def _name(owner: dict[str, object]) -> str:
    if not owner:
        return "somebody"
    return f"step {owner.get('step')!r} (step run {owner.get('step_run')}, process {owner.get('process')})"


def _join(texts: Sequence[str] | Iterator[str]) -> str:
    listed = list(texts)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _numbered(directory: Path) -> list[Path]:
    tickets = [path for path in directory.iterdir() if path.name.isdecimal()]
    return sorted(tickets, key=lambda path: int(path.name))
