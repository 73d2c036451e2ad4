"""Steps as processes of the Airflow worker's machine.

A program gets a session of its own and a guardian (:mod:`airflow_mlpipelines.compute.guardian`) that
ends all of it: on a timeout, when the task is killed, when the worker itself is, and when the program
has ended but something that it started has not. It is not adopted by a later try, since its log would
be lost; the next try makes sure that it is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING

from airflow_mlpipelines._naming import list_options
from airflow_mlpipelines.compute.base import Launcher, ProcessPaths
from airflow_mlpipelines.compute.environments import (
    interpreter_variables,
    is_python_ready,
    prepare_python,
    resolve_python,
)
from airflow_mlpipelines.compute.gpu_locks import Claim, GpuQueue
from airflow_mlpipelines.compute.gpus import CUDA, compute_gpus, device_variables, machine_gpus
from airflow_mlpipelines.compute.guardian import (
    GRACE_SECONDS,
    Guardian,
    Program,
    describe_exit,
)
from airflow_mlpipelines.compute.processes import end_process, kill_marked, machine_identity
from airflow_mlpipelines.exceptions import ComputeUnavailableError, StepFailedError
from airflow_mlpipelines.runtime.log_lines import LineFolder
from airflow_mlpipelines.runtime.rendezvous import GPUS_PER_NODE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlpipelines.compute.base import (
        Emit,
        HandleStore,
        ResolvedEnvironment,
        Stage,
        StepLaunch,
    )
    from airflow_mlpipelines.compute.gpus import Gpu
    from airflow_mlpipelines.compute.guardian import ProgramEnd
    from airflow_mlpipelines.definition.graph import (
        EnvironmentSpec,
        LocalComputeSpec,
        ResourcesSpec,
    )

log = logging.getLogger(__name__)

STEP_RUN_VARIABLE = "MLP_STEP_RUN_ID"
"""Set for every process of a step: by this a later try finds what an earlier one left."""
_KIND = "local"
_KILL_SECONDS = GRACE_SECONDS + 1
_TAIL_LINES = 50
_TAIL_CHARACTERS = 2000
_SHELL_KILLED = 128 + signal.SIGKILL
_GIB = 1 << 30
# What configures the worker is not the step's business, above all not the worker's credentials.
_WORKERS_OWN = ("AIRFLOW__", "AIRFLOW_CONN_", "AIRFLOW_VAR_", "_AIRFLOW", "__AIRFLOW")


class LocalLauncher(Launcher):
    """Runs one step as a process beside the worker's."""

    def __init__(self, compute: LocalComputeSpec) -> None:
        self._compute = compute
        self._python = sys.executable
        self._guardian: Guardian | None = None
        self._thread: int | None = None
        self._over = threading.Event()
        self._over.set()
        self._killed = False

    def check_resources(self, step: str, resources: ResourcesSpec, *, nodes: int = 1) -> None:
        """Return, unless the step asks for more GPUs than this worker can hand out.

        Raises:
            ComputeUnavailableError: It does.
        """
        del step
        if resources.gpus:
            self._find_gpus(resources.gpus * nodes)

    # ---- the environment -------------------------------------------------------------------

    def resolve_environment(self, environment: EnvironmentSpec | None) -> ResolvedEnvironment:
        """Return the packages of the worker's own interpreter, or of one that is made for them.

        Raises:
            EnvironmentBuildError: The packages can't be resolved, or a process can't have that
                environment.
        """
        return resolve_python(environment, compute=self._compute.name)

    def prepare_environment(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment, *, emit: Emit
    ) -> ResolvedEnvironment:
        """Return ``resolved`` with the interpreter to run, its packages installed.

        Raises:
            EnvironmentBuildError: They can't be installed.
        """
        ready = prepare_python(environment, resolved, emit=emit)
        self._python = ready.python or sys.executable
        return ready

    def is_prepared(
        self, environment: EnvironmentSpec | None, resolved: ResolvedEnvironment
    ) -> bool | None:
        """Return whether the interpreter and its packages are there."""
        del resolved
        return is_python_ready(environment)

    def process_paths(self, stage: Stage, environment: ResolvedEnvironment) -> ProcessPaths:
        """Return the places of ``stage`` as they are: the process runs on the same machine."""
        return ProcessPaths(
            code=str(stage.code),
            runtime=str(stage.runtime),
            run=str(stage.run),
            inputs={name: str(path) for name, path in stage.inputs.items()},
            outputs={name: str(path) for name, path in stage.outputs.items()},
            python=environment.python or sys.executable,
        )

    # ---- the process -----------------------------------------------------------------------

    def recover(self, step_run_id: str, handle: HandleStore) -> bool:
        """Return False, once nothing of an earlier try is running any more on this machine.

        On another machine its guardian has ended it, or is about to.

        Raises:
            ComputeUnavailableError: Something of it can't be ended.
        """
        noted = handle.get()
        if noted is None or noted.get("launcher") != _KIND:
            return False
        if noted.get("machine") == machine_identity():
            log.info("An earlier try was lost; making sure that its program is, too")
            _end_earlier(step_run_id, int(noted["guardian"]), int(noted["started"]))
        handle.set(None)
        return False

    def run(self, launch: StepLaunch, *, emit: Emit, handle: HandleStore) -> None:
        """Run the program to its end.

        Raises:
            StepFailedError: It did not start, did not end by itself, or with another exit code than 0.
        """
        self.recover(launch.step_run_id, handle)
        _note_limits(launch.resources)
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._thread = threading.get_ident()
        self._over.clear()
        try:
            with self._claim_gpus(launch, emit) as claim:
                end = self._run_guarded(launch, claim, emit, handle, tail)
        finally:
            self._over.set()
        handle.set(None)
        self._check(launch, end, tuple(tail))

    def _run_guarded(
        self,
        launch: StepLaunch,
        claim: Claim,
        emit: Emit,
        handle: HandleStore,
        tail: deque[str],
    ) -> ProgramEnd:
        """Return how the program ended; the last lines that it printed are in ``tail``."""
        guardian = Guardian(self._program(launch, claim), held=claim.files)
        try:
            # Noted before it starts: whatever runs can be found again.
            handle.set(
                {
                    "launcher": _KIND,
                    "machine": machine_identity(),
                    "guardian": guardian.pid,
                    "started": guardian.started,
                }
            )
            self._guardian = guardian
            if self._killed:  # before there was anything to stop
                guardian.stop()
            else:
                guardian.go()
            end = _follow(guardian, emit, tail)
        except BaseException:  # above all a timeout or an interrupt, which Airflow raises in here
            guardian.stop()
            _follow(guardian, lambda _: None, tail)
            handle.set(None)
            raise
        finally:
            self._guardian = None
            guardian.close()
        if end.exit_code is None and end.start_error is None:  # nobody has ended it for sure
            kill_marked(STEP_RUN_VARIABLE, launch.step_run_id)
        return end

    def kill(self) -> None:
        """End the program and all it started, within three seconds.

        Called by a signal handler in the very thread that runs :meth:`run`, it returns at once: that
        thread has to go on, and take in what the program prints to the end.
        """
        self._killed = True
        guardian = self._guardian
        if guardian is not None:
            guardian.stop()
        if threading.get_ident() != self._thread:
            self._over.wait(_KILL_SECONDS)

    @cached_property
    def _machine_gpus(self) -> list[Gpu]:
        return machine_gpus()

    def _find_gpus(self, count: int) -> list[Gpu]:
        """Return the GPUs that this compute has here.

        Raises:
            ComputeUnavailableError: They are fewer than ``count``.
        """
        found = compute_gpus(self._compute.gpus, machine=self._machine_gpus)
        if count > len(found):
            raise ComputeUnavailableError(_too_few(self._compute, count, found, self._machine_gpus))
        return found

    def _claim_gpus(self, launch: StepLaunch, emit: Emit) -> Claim:
        """Return the GPUs that the step asks for, for each of its nodes, once they are free.

        Raises:
            ComputeUnavailableError: There are not as many here.
            StepFailedError: It was killed while it waited for them.
        """
        count = (launch.resources.gpus or 0) * launch.nodes
        if not count:
            return Claim()
        queue = GpuQueue(
            self._find_gpus(count),
            count,
            step=launch.step_name,
            step_run_id=launch.step_run_id,
        )
        claim = queue.wait(emit=emit, cancelled=lambda: self._killed)
        if claim is None:
            raise StepFailedError(launch.step_name, "it was killed while it waited for GPUs")
        return claim

    def _program(self, launch: StepLaunch, claim: Claim) -> Program:
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(_WORKERS_OWN)
        }
        env |= interpreter_variables(self._python, env.get("PATH"))
        env |= launch.env
        if self._python == sys.executable and os.environ.get("PYTHONPATH"):
            # The worker's interpreter comes with the paths that it has in the worker.
            paths = [env.get("PYTHONPATH", ""), os.environ["PYTHONPATH"]]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        env |= launch.secrets
        if claim.gpus or self._compute.gpus is not None:
            env |= device_variables(claim.gpus)
        if claim.gpus and launch.nodes > 1:
            env[GPUS_PER_NODE] = str(launch.resources.gpus)
        env[STEP_RUN_VARIABLE] = launch.step_run_id
        return Program(launch.argv, env, str(launch.stage.code), launch.timeout_seconds)

    def _check(self, launch: StepLaunch, end: ProgramEnd, log_tail: tuple[str, ...]) -> None:
        """Return if the program ended well.

        Raises:
            StepFailedError: It did not.
        """
        if end.survivors:
            log.warning("These processes of the step could not be killed: %s", list(end.survivors))
        if end.exit_code == 0 and end.cause is None and not self._killed:
            return
        raise StepFailedError(
            launch.step_name,
            self._why(launch, end),
            exit_code=end.exit_code,
            log_tail=log_tail,
            # A program that does not start would not start the next time either.
            retryable=end.start_error is None,
        )

    def _why(self, launch: StepLaunch, end: ProgramEnd) -> str:
        if self._killed:
            return "it was killed"
        if end.cause == "timeout":
            return f"it ran longer than its timeout of {launch.timeout_seconds:g} seconds, and was killed"
        if end.cause == "stopped":
            return (
                "it was ended: somebody has sent a signal to its guardian, or a later try has begun"
            )
        if end.start_error is not None:
            return f"{launch.argv[0]!r} could not be started: {end.start_error}"
        if end.exit_code is None:
            return "its guardian was killed, and so it was killed as well; the machine may be out of memory"
        if end.exit_code in (-signal.SIGKILL, _SHELL_KILLED):
            peak = ""
            if end.peak_memory:
                peak = f" Its largest process had {end.peak_memory / _GIB:.1f} GiB in memory."
            return (
                f"it was killed with SIGKILL, most likely because the machine, or the worker's container, "
                f"ran out of memory.{peak} Let it use less, or run it on a larger compute."
            )
        return f"it ended with {describe_exit(end.exit_code)}"


def _follow(guardian: Guardian, emit: Emit, tail: deque[str]) -> ProgramEnd:
    """Hand on what the program prints until it is over; return how it ended."""
    folder = LineFolder()
    for data in guardian.read_output():
        for line in folder.feed(data):
            tail.append(line[:_TAIL_CHARACTERS])
            emit(line)
    for line in folder.finish():
        tail.append(line[:_TAIL_CHARACTERS])
        emit(line)
    return guardian.wait()


def _end_earlier(step_run_id: str, guardian: int, started: int) -> None:
    """End what an earlier try has left on this machine: by its guardian, then one by one."""
    gone = end_process(guardian, started, seconds=_KILL_SECONDS + 1)
    alive = kill_marked(STEP_RUN_VARIABLE, step_run_id)
    if alive or not gone:
        raise ComputeUnavailableError(
            f"Processes {alive or [guardian]} of an earlier try of this step can't be ended. Two tries at once "
            "would spoil each other's outputs: end them, then clear the task."
        )


def _too_few(
    compute: LocalComputeSpec, count: int, found: Sequence[Gpu], machine: Sequence[Gpu]
) -> str:
    declared = compute.gpus
    has = "all that there are" if declared is None else declared
    if declared is not None and not isinstance(declared, int):
        has = list_options(declared)
    text = (
        f"compute {compute.name!r}: the step asks for {count} GPUs, but this worker "
        f"({socket.gethostname()}) can hand out {len(found)}. The compute's 'gpus' are {has}; "
        f"the machine shows {len(machine) or 'none'}"
    )
    limit = os.environ.get(CUDA)
    if limit is not None:
        text += f", of which the worker may use {CUDA}={limit!r}"
    if not machine:
        text += (
            " (nvidia-smi finds none, and neither does the driver). Send the step to a worker with GPUs, "
            "or declare the ids of GPUs of another make: gpus: [0, 1]"
        )
    return f"{text}."


def _note_limits(resources: ResourcesSpec) -> None:
    asked = resources.model_dump(exclude_none=True, exclude={"gpus"})
    if asked:
        listed = ", ".join(f"{name}={value}" for name, value in asked.items())
        log.info("A local compute does not limit what a program takes; not enforced: %s", listed)
