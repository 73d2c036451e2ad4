"""The GPUs of this machine: which there are, which of them a compute has, how a program is told its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

CUDA = "CUDA_VISIBLE_DEVICES"
_CUDA_ORDER = "CUDA_DEVICE_ORDER"
_NVIDIA = "NVIDIA_VISIBLE_DEVICES"
_HIP = "HIP_VISIBLE_DEVICES"
_NO_ID = "-1"
_DRIVER = Path("/proc/driver/nvidia/gpus")
_DEVICES = Path("/dev")
_SMI_SECONDS = 60
_GPU_LINE = re.compile(r"GPU (?P<index>\d+): .*\(UUID: (?P<id>[^)\s]+)\)")
_PART_LINE = re.compile(r"\s+MIG .*\(UUID: (?P<id>[^)\s]+)\)")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one part of one that is divided (MIG).

    Attributes:
        id: What a program is told: as it was declared, else the driver's own id (``GPU-…``, ``MIG-…``).
        key: What it is known by on this machine, however it was declared: the driver's id where
            that is known, else as ``id``.
        index: Its number in ``nvidia-smi``, where it has one.
    """

    id: str
    key: str
    index: str | None = None

    def is_named(self, name: str) -> bool:
        """Return whether ``name`` means this one: its number, its id, or the beginning of its id."""
        # As CUDA reads them: GPU-8932f937 is enough, where no other one begins with it.
        begins = not name.isdecimal() and self.key.startswith(name)
        return name in (self.id, self.index) or begins


def machine_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that this process could use, in the driver's order; none is no error.

    Asks ``nvidia-smi``, which may take a second. Where there is none, reads what the driver shows in
    ``/proc``. A GPU that is divided is listed by its parts. Of GPUs of other makers nothing is known.
    """
    return _ask_smi() or _read_driver(_DRIVER, _DEVICES)


def compute_gpus(
    declared: int | Sequence[str] | None,
    *,
    machine: Sequence[Gpu],
    environ: Mapping[str, str] = os.environ,
) -> list[Gpu]:
    """Return the GPUs that a compute has on this machine, each one once.

    Args:
        declared: What its definition says: ids; or how many of the machine's it has, from the first on;
            or None for all of them.
        machine: Those of the machine. Where it knows of none, declared ids are believed; else
            those that it lacks are left out, for a workspace may name the GPUs of several workers.
        environ: The worker's environment. Its ``CUDA_VISIBLE_DEVICES`` (and of declared numbers
            ``HIP_VISIBLE_DEVICES``), if set, leaves only those that it names.
    """
    if declared is None or isinstance(declared, int):
        return _limit(machine, environ)[:declared]
    if not machine:
        return _limit(_once(Gpu(name, name) for name in declared), environ)
    found = (
        Gpu(name, gpu.key, gpu.index) for name in declared for gpu in machine if gpu.is_named(name)
    )
    return _limit(_once(found), environ)


def device_variables(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return the environment variables by which a program sees exactly ``gpus``, or none at all.

    The number of a GPU is the one that ``nvidia-smi`` gives it, which is CUDA's only if it is told so.
    """
    numbers = all(gpu.id.isdecimal() for gpu in gpus)
    # CUDA does not take numbers and ids in one list.
    ids = ",".join(gpu.id if numbers else gpu.key for gpu in gpus)
    variables = {CUDA: ids, _NVIDIA: ids or "void"}
    if numbers:
        # ROCm takes an empty list for no list.
        variables |= {_CUDA_ORDER: "PCI_BUS_ID", _HIP: ids or _NO_ID}
    return variables


def _limit(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """Return those that the worker itself may use, in the order in which it was given them."""
    left = list(gpus)
    for variable in (CUDA, _HIP):
        text = environ.get(variable)
        if text is None or (variable == _HIP and not all(gpu.id.isdecimal() for gpu in left)):
            continue
        names = [name.strip() for name in text.split(",") if name.strip()]
        left = _once(gpu for name in names for gpu in left if gpu.is_named(name))
    return left


def _once(gpus: Iterable[Gpu]) -> list[Gpu]:
    return list({gpu.key: gpu for gpu in gpus}.values())


def _ask_smi() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    # What it lists must be what there is, whatever this worker was given of it.
    env = {name: value for name, value in os.environ.items() if name != CUDA}
    try:
        done = subprocess.run(
            [program, "-L"],
            check=False,
            capture_output=True,
            text=True,
            timeout=_SMI_SECONDS,
            env=env,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_smi_list(done.stdout) if done.returncode == 0 else []


def parse_smi_list(text: str) -> list[Gpu]:
    """Return the GPUs of ``nvidia-smi -L``.

    Example:
        >>> parse_smi_list("GPU 0: NVIDIA H200 (UUID: GPU-6a1c)")
        [Gpu(id='GPU-6a1c', key='GPU-6a1c', index='0')]
    """
    whole: dict[str, Gpu] = {}
    parts: dict[str, list[Gpu]] = {}
    index = ""
    for line in text.splitlines():
        if match := _GPU_LINE.match(line):
            index = match["index"]
            whole[index] = Gpu(match["id"], match["id"], index)
        elif match := _PART_LINE.match(line):
            parts.setdefault(index, []).append(Gpu(match["id"], match["id"]))
    return [gpu for index, one in whole.items() for gpu in parts.get(index, [one])]


def _read_driver(driver: Path, devices: Path) -> list[Gpu]:
    """Return what the driver shows; a container sees all of the host there, but not their devices."""
    gpus: list[Gpu] = []
    try:
        addresses = sorted(driver.iterdir())
    except OSError:
        return []
    for address in addresses:
        try:
            lines = (address / "information").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        uuid = facts.get("GPU UUID", "").strip()
        minor = facts.get("Device Minor", "").strip()
        if uuid.startswith("GPU-") and (devices / f"nvidia{minor}").exists():
            gpus.append(Gpu(uuid, uuid, str(len(gpus))))
    return gpus
