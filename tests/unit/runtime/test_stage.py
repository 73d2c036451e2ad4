from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from airflow_mlpipelines.runtime import stage
from airflow_mlpipelines.runtime.stage import stage_runtime

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_it_is_made_once(tmp_path: Path) -> None:
    first = stage_runtime(tmp_path)
    made = (first / "airflow_mlpipelines" / "__init__.py").stat().st_mtime_ns
    assert stage_runtime(tmp_path) == first
    assert (first / "airflow_mlpipelines" / "__init__.py").stat().st_mtime_ns == made


def test_another_content_gets_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage_runtime(tmp_path)
    copy = tmp_path / "another release"
    subprocess.run(["cp", "-r", str(stage._PACKAGE), str(copy)], check=True)
    (copy / "runtime" / "run.py").write_text("changed = True\n")
    monkeypatch.setattr(stage, "_PACKAGE", copy)
    assert stage_runtime(tmp_path) != first
    assert first.is_dir()


def test_many_at_once_make_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(stage_runtime, [tmp_path] * 16))
    assert len(found) == 1
    assert [path.name for path in tmp_path.iterdir()] == [found.pop().name]


def test_any_user_can_read_it(tmp_path: Path) -> None:
    staged = stage_runtime(tmp_path)
    for path in (staged, *staged.rglob("*")):
        wanted = 0o555 if path.is_dir() else 0o444
        assert path.stat().st_mode & wanted == wanted, path


def test_nothing_but_run_and_its_modules_is_in_it(tmp_path: Path) -> None:
    staged = stage_runtime(tmp_path)
    modules = {file.relative_to(staged).as_posix() for file in staged.rglob("*.py")}
    assert modules == {f"airflow_mlpipelines/{name}" for name in stage._STAGED}


def test_this_interpreter_need_not_compile_it(tmp_path: Path) -> None:
    staged = stage_runtime(tmp_path)
    done = subprocess.run(
        [sys.executable, "-v", "-c", "from airflow_mlpipelines import Run"],
        env={"PYTHONPATH": str(staged), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    ours = [line for line in done.stderr.splitlines() if "matches" in line and str(staged) in line]
    assert len(ours) >= 4
