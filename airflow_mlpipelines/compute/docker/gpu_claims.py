"""Which GPUs the containers of one step get, so that no two steps have the same one.

Docker hands out GPUs, but does not keep apart what it has handed out. On this machine, containers and
local processes share the locks of :mod:`airflow_mlpipelines.compute.gpu_locks`. Of a daemon elsewhere there are
no locks: what its steps' containers run with is in use, and a container that is never started, of a name that
can be given only once, sees to it that one at a time chooses.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from airflow_mlpipelines.compute.container_layout import LABEL_PREFIX, STEP_RUN_LABEL
from airflow_mlpipelines.compute.container_use import is_using, local_socket, requested_gpus
from airflow_mlpipelines.compute.docker.daemon import (
    daemon_url,
    find_container,
    is_name_taken,
    remove_container,
    unreachable,
)
from airflow_mlpipelines.compute.gpu_locks import Containers, GpuQueue
from airflow_mlpipelines.compute.gpus import Gpu, machine_gpus
from airflow_mlpipelines.exceptions import StepFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from docker import APIClient

    from airflow_mlpipelines.compute.base import Emit, StepLaunch
    from airflow_mlpipelines.definition.graph import DockerComputeSpec

_NVIDIA_CDI = re.compile(r"nvidia\.com/gpu=(?P<gpu>.+)")
_TURNSTILE = "mlp-gpu-turnstile"
_TURNSTILE_LABEL = f"{LABEL_PREFIX}turnstile"
_ABANDONED_SECONDS = 120.0
_LOOK_SECONDS = 2.0
_TURNSTILE_PAUSE = 0.2
_SAY_AGAIN_SECONDS = 30.0
_SHOWN = 8


class GpuClaim:
    """The GPUs of a step's containers, theirs alone until the end of the block and of the containers.

    Attributes:
        ids: As the daemon is to be asked for them, for all containers together; none if the step asks for
            none, or the daemon shall choose.
    """

    def __init__(self, ids: Sequence[str] = ()) -> None:
        self.ids = tuple(ids)
        self.until_end = ExitStack()
        self.until_started = ExitStack()

    def started(self) -> None:
        """Say that the containers run: from now on others see what they have."""
        self.until_started.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.until_started.close()
        self.until_end.__exit__(kind, error, trace)


def daemon_gpus(compute: DockerComputeSpec, machine: Sequence[Gpu], *, needed: int) -> list[Gpu]:
    """Return the GPUs of a compute by the ids that the daemon is asked for; none if only it knows them.

    Args:
        compute: The compute. Of a number of GPUs it has the machine's first, else those numbered from 0 on.
        machine: What this worker sees of the daemon's machine. What it does not see may be there.
        needed: How many are taken to be there where neither says.
    """
    declared = compute.gpus
    if not isinstance(declared, tuple):
        if machine:
            return [Gpu(gpu.key, gpu.key, gpu.index) for gpu in machine][:declared]
        count = needed if declared is None else declared
        return [Gpu(str(number), str(number)) for number in range(count)]
    found: dict[str, Gpu] = {}
    for name in declared:
        is_cdi = _NVIDIA_CDI.fullmatch(name)
        bare = is_cdi["gpu"] if is_cdi else name
        seen = next((gpu for gpu in machine if gpu.is_named(bare)), Gpu(bare, bare))
        # A number that this worker's view gives another GPU than the daemon's would is avoided by the id.
        found.setdefault(seen.key, Gpu(name if is_cdi else seen.key, seen.key))
    return list(found.values())


def claim_gpus(
    client: APIClient,
    compute: DockerComputeSpec,
    launch: StepLaunch,
    names: Sequence[str],
    *,
    adopted: Sequence[Mapping[str, Any] | None] | None = None,
    emit: Emit,
    cancelled: Callable[[], bool],
) -> GpuClaim:
    """Return the GPUs for the containers of ``names``, which each get as many, as soon as they are free.

    Args:
        client: The connection to the daemon.
        compute: The compute.
        launch: The step.
        names: The containers.
        adopted: What the daemon says of these containers if an earlier try has started them: they have
            GPUs already, which are theirs for as long as they run.
        emit: Told of waiting.
        cancelled: Whether to wait no longer.

    Raises:
        StepFailedError: The compute has not as many, or the step was killed while it waited.
        ComputeUnavailableError: The locks can't be made, or the daemon does not answer.
    """
    each = launch.resources.gpus or 0
    needed = each * len(names)
    claim = GpuClaim()
    if not needed:
        return claim
    daemon = local_socket(daemon_url(compute))
    gpus = daemon_gpus(compute, machine_gpus() if daemon else [], needed=needed)
    if adopted is not None:
        ids = [name for each in adopted if each for name in requested_gpus(each) or ()]
        known = {gpu.id: gpu for gpu in gpus}
        gpus, needed = [known.get(name, Gpu(name, _bare(name))) for name in ids], len(ids)
    elif len(gpus) < needed:
        nodes = f" on each of {len(names)} nodes" if len(names) > 1 else ""
        raise StepFailedError(
            launch.step_name,
            f"it asks for {each} GPUs{nodes}, but compute {compute.name!r} has {len(gpus)} (its 'gpus')",
            retryable=False,
        )
    if daemon is None:
        if adopted is not None:
            claim.ids = tuple(gpu.id for gpu in gpus)
            return claim
        try:
            claim.ids, claim.until_started = _choose(
                client, gpus, needed, launch=launch, emit=emit, cancelled=cancelled
            )
        except OSError as error:  # docker's and requests' errors are OSErrors
            raise unreachable(compute, str(error)) from error
        return claim
    queue = GpuQueue(
        gpus,
        needed,
        step=launch.step_name,
        step_run_id=launch.step_run_id,
        containers=Containers(daemon, tuple(names)),
    )
    taken = queue.wait(emit=emit, cancelled=cancelled) if adopted is None else queue.take_over()
    if taken is None:
        raise _killed(launch)
    claim.until_end.push(taken)
    claim.ids = tuple(gpu.id for gpu in taken.gpus)
    return claim


# ---- a daemon elsewhere ----------------------------------------------------------------------


def _choose(
    client: APIClient,
    gpus: Sequence[Gpu],
    needed: int,
    *,
    launch: StepLaunch,
    emit: Emit,
    cancelled: Callable[[], bool],
) -> tuple[tuple[str, ...], ExitStack]:
    """Return GPUs that no step's container on the daemon runs with, and what keeps others from choosing meanwhile."""
    said, say_from, started = "", 0.0, time.monotonic()
    while not cancelled():
        with ExitStack() as stack:
            stack.enter_context(_turnstile(client, cancelled))
            users = _users(client, gpus)
            free = [gpu.id for gpu in gpus if gpu.id not in users]
            if len(free) >= needed:
                if said:
                    emit(f"Got its GPUs after {time.monotonic() - started:.1f} s")
                return tuple(free[:needed]), stack.pop_all()
        held = [f"GPU {gpu} is held by step run {user}" for gpu, user in sorted(users.items())]
        now = time.monotonic()
        line = f"Waiting for {needed} of the {len(gpus)} GPUs of this compute: {', '.join(held[:_SHOWN])}"
        if line != said and now >= say_from:
            emit(line)
            said, say_from = line, now + _SAY_AGAIN_SECONDS
        time.sleep(_LOOK_SECONDS)
    raise _killed(launch)


def _users(client: APIClient, gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return the ids of those GPUs that a step's container runs with, and its step run."""
    users: dict[str, str] = {}
    for listed in client.containers(filters={"label": STEP_RUN_LABEL}):
        found = find_container(client, listed["Id"])
        if found is not None:
            step_run = str(listed["Labels"][STEP_RUN_LABEL])
            used = {_bare(name) for name in requested_gpus(found) or ()}
            users |= {
                gpu.id: step_run for gpu in gpus if _bare(gpu.id) in used or is_using(found, gpu.id)
            }
    return users


def _bare(name: str) -> str:
    is_cdi = _NVIDIA_CDI.fullmatch(name)
    return is_cdi["gpu"] if is_cdi else name


@contextmanager
def _turnstile(client: APIClient, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Be alone with the choice of GPUs on a daemon; one that was abandoned two minutes ago is removed."""
    from docker.errors import APIError

    made: str | None = None
    while made is None and not cancelled():
        try:
            made = client.create_container(
                client.images(quiet=True)[0],  # any: it is never started
                name=_TURNSTILE,
                command=["true"],
                labels={_TURNSTILE_LABEL: "gpus"},
            )["Id"]
        except APIError as error:
            if not is_name_taken(error):
                raise
            there = find_container(client, _TURNSTILE)
            if there is not None and _age(client, there) > _ABANDONED_SECONDS:
                remove_container(client, there["Id"])
            time.sleep(_TURNSTILE_PAUSE)
    try:
        yield
    finally:
        if made is not None:
            remove_container(client, made)


def _age(client: APIClient, container: Mapping[str, Any]) -> float:
    """Return how many seconds ago the container was made, by the daemon's own clock."""
    now = datetime.fromisoformat(client.info()["SystemTime"])
    return (now.astimezone(UTC) - datetime.fromisoformat(container["Created"])).total_seconds()


def _killed(launch: StepLaunch) -> StepFailedError:
    return StepFailedError(launch.step_name, "it was killed while it waited for GPUs")
