"""Which GPUs a compute has, and how a program is told its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from airflow_mlpipelines.compute.gpus import (
    Gpu,
    _read_driver,
    compute_gpus,
    device_variables,
    machine_gpus,
    parse_smi_list,
)

if TYPE_CHECKING:
    from pathlib import Path

A, B, C = (Gpu(f"GPU-{name * 4}", f"GPU-{name * 4}", str(n)) for n, name in enumerate("abc"))
MACHINE = [A, B, C]
SMI = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 1g.5gb      Device  1: (UUID: MIG-GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77/1/0)
GPU 1: NVIDIA GeForce RTX 4090 (rev a) (UUID: GPU-8932f937-d72c-4106-c12f-20bd9faed9f6)
"""


def ids(gpus: list[Gpu]) -> list[str]:
    return [gpu.id for gpu in gpus]


@pytest.mark.parametrize(
    ("declared", "limit", "expected"),
    [
        (None, None, [A.id, B.id, C.id]),
        (2, None, [A.id, B.id]),
        (0, None, []),
        (8, None, [A.id, B.id, C.id]),
        (None, "2,0", [C.id, A.id]),
        (1, "2,0", [C.id]),
        (None, "GPU-bb", [B.id]),
        (None, "", []),
        (None, "-1", []),
        (None, "NoDevFiles", []),
        (("1", "2"), None, ["1", "2"]),
        (("1", "2"), "2", ["2"]),
        (("1", "2"), B.id, ["1"]),
        (("GPU-cccc", "7", "GPU-other"), None, ["GPU-cccc"]),
    ],
)
def test_a_compute_has_what_is_declared_and_there_and_left_to_the_worker(
    declared: int | tuple[str, ...] | None, limit: str | None, expected: list[str]
) -> None:
    environ = {} if limit is None else {"CUDA_VISIBLE_DEVICES": limit}
    assert ids(compute_gpus(declared, machine=MACHINE, environ=environ)) == expected


def test_a_gpu_that_is_declared_twice_is_one() -> None:
    found = compute_gpus(("0", A.id, "GPU-aa"), machine=MACHINE, environ={})
    assert len(found) == 1


def test_a_number_and_an_id_lock_the_same_gpu() -> None:
    (by_number,) = compute_gpus(("1",), machine=MACHINE, environ={})
    (by_id,) = compute_gpus((B.id,), machine=MACHINE, environ={})
    assert by_number.key == by_id.key
    assert by_number.id == "1"


def test_declared_gpus_are_believed_where_the_machine_shows_none() -> None:
    assert ids(compute_gpus(("0", "1"), machine=[], environ={})) == ["0", "1"]
    assert ids(compute_gpus(("0", "1"), machine=[], environ={"CUDA_VISIBLE_DEVICES": "1"})) == ["1"]
    assert ids(compute_gpus(("0", "1"), machine=[], environ={"HIP_VISIBLE_DEVICES": "0"})) == ["0"]
    assert compute_gpus(2, machine=[], environ={}) == []


def test_a_program_is_told_ids_or_numbers_but_not_both() -> None:
    assert device_variables([A, B]) == {
        "CUDA_VISIBLE_DEVICES": f"{A.id},{B.id}",
        "NVIDIA_VISIBLE_DEVICES": f"{A.id},{B.id}",
    }
    numbers = device_variables([Gpu("2", C.id, "2"), Gpu("0", A.id, "0")])
    assert numbers["CUDA_VISIBLE_DEVICES"] == numbers["HIP_VISIBLE_DEVICES"] == "2,0"
    assert numbers["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    mixed = device_variables([Gpu("2", C.id, "2"), A])
    assert mixed["CUDA_VISIBLE_DEVICES"] == f"{C.id},{A.id}"


def test_no_gpus_are_no_gpus_for_cuda_and_for_rocm() -> None:
    told = device_variables([])
    assert told["CUDA_VISIBLE_DEVICES"] == ""
    assert (told["NVIDIA_VISIBLE_DEVICES"], told["HIP_VISIBLE_DEVICES"]) == ("void", "-1")


def test_a_divided_gpu_is_listed_by_its_parts() -> None:
    assert parse_smi_list(SMI) == [
        Gpu(name, name)
        for name in (
            "MIG-c7384736-a75d-5afc-978f-d2f1294409fd",
            "MIG-GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77/1/0",
        )
    ] + [
        Gpu(
            "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
            "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
            "1",
        )
    ]


def test_nvidia_smi_on_the_path_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert len(machine_gpus()) == 3


def test_a_container_sees_only_the_gpus_whose_devices_it_has(tmp_path: Path) -> None:
    driver, devices = tmp_path / "gpus", tmp_path / "dev"
    devices.mkdir()
    for minor, name in enumerate("ab"):
        directory = driver / f"0000:0{minor}:00.0"
        directory.mkdir(parents=True)
        (directory / "information").write_text(
            f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{name}\nDevice Minor: \t {minor}\n"
        )
    (devices / "nvidia1").touch()
    assert _read_driver(driver, devices) == [Gpu("GPU-b", "GPU-b", "0")]
    assert _read_driver(tmp_path / "nowhere", devices) == []
