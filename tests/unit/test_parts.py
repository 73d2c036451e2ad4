"""In CI no test is skipped, however it came to that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import ALLOWED_SKIPS, REQUIRE_PARTS

ROOT = Path(__file__).parents[2]
SKIPS = {
    "a call": "def test_it(): pytest.skip('the reason')",
    "a mark": "@pytest.mark.skipif(True, reason='the reason')\ndef test_it(): pass",
    "a fixture": (
        "@pytest.fixture\ndef part(): pytest.skip('the reason')\n\ndef test_it(part): pass"
    ),
    "an import": "def test_it(): pytest.importorskip('no_such_module', reason='the reason')",
    "an import of the module": "pytest.importorskip('no_such_module', reason='the reason')",
}


def run(tmp_path: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a test file as those of this repository are."""
    (tmp_path / "test_sample.py").write_text(f"import pytest\n\n{code}\n")
    others = {name: value for name, value in os.environ.items() if name != REQUIRE_PARTS}
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-p", "tests.conftest", "-c", os.devnull, "--rootdir", tmp_path, tmp_path),
        ],
        env={**others, "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("code", SKIPS.values(), ids=SKIPS.keys())
def test_a_skip_fails_in_ci_with_its_reason(tmp_path: Path, code: str) -> None:
    elsewhere = run(tmp_path, code)
    in_ci = run(tmp_path, code, **{REQUIRE_PARTS: "1"})

    assert "1 skipped" in elsewhere.stdout
    assert in_ci.returncode == (2 if code == SKIPS["an import of the module"] else 1)
    assert "skipped: the reason" in in_ci.stdout
    assert "1 skipped" not in in_ci.stdout


def test_what_may_be_skipped_and_what_is_expected_to_fail_does_not_fail_in_ci(
    tmp_path: Path,
) -> None:
    code = (
        f"def test_allowed(): pytest.skip({min(ALLOWED_SKIPS)!r})\n\n"
        "@pytest.mark.xfail\ndef test_expected(): assert False"
    )

    in_ci = run(tmp_path, code, **{REQUIRE_PARTS: "1"})

    assert in_ci.returncode == 0, in_ci.stdout
    assert "1 skipped, 1 xfailed" in in_ci.stdout
