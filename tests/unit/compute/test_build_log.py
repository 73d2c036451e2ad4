"""The log of a build, and what a failure in it comes to in words."""

from __future__ import annotations

import re

import pytest

from airflow_mlpipelines.compute.build_failures import find_hint, is_network_failure
from airflow_mlpipelines.compute.build_log import BuildLog
from airflow_mlpipelines.exceptions import EnvironmentBuildError


def read(*pieces: str) -> tuple[BuildLog, list[str]]:
    lines: list[str] = []
    log = BuildLog(lines.append)
    for piece in pieces:
        log.feed(piece)
    log.finish()
    return log, lines


def test_a_line_in_pieces_is_one_line_and_noise_is_left_out() -> None:
    log, lines = read(
        "Step 1/2 : FROM a\n",
        " ---> 0123\n",
        "Step 2/2 : RUN",
        " pip install b\n ---> Running in 4567\n\x1b[91mbad ",
        "news\x1b[0m\r\n 5%\r 80%\rall of it\n",
        "the end",
    )
    assert lines == [
        "Step 1/2 : FROM a",
        "Step 2/2 : RUN pip install b",
        "bad news",
        "all of it",
        "the end",
    ]
    assert log.instruction == "RUN pip install b"


def test_of_several_instructions_at_work_the_one_that_failed_is_named() -> None:
    log, _ = read(
        "#5 [a 2/3] RUN make one\n#6 [b 2/2] RUN make two\n",
        "#5 0.2 hello\n#6 0.3 hello\n",
        '#5 ERROR: process "/bin/sh -c make one" did not complete successfully: exit code: 2\n',
    )
    assert log.instruction == "RUN make one"


def test_only_the_end_of_a_long_log_is_kept() -> None:
    log, lines = read("".join(f"line {number} {'x' * 900}\n" for number in range(100)))
    assert len(lines) == 100
    assert len(log.tail) == 30
    assert max(map(len, log.tail)) <= 500
    assert log.tail[-1].startswith("line 99 ")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("/bin/sh: 1: apt-get: not found", "no apt-get"),
        ("/bin/sh: 1: python3: not found", r"add apt=\['python3', 'python3-pip'\]"),
        ("/usr/bin/python3: No module named pip", r"add apt=\['python3-pip'\]"),
        ("E: Version '9' for 'git' was not found", r"Version '9' for 'git' was not found. Correct"),
        ("ERROR: ResolutionImpossible: for help visit", "contradict"),
        ("write /x: no space left on device", "disk is full"),
    ],
)
def test_a_known_failure_has_a_way_out(text: str, hint: str) -> None:
    assert re.search(hint, find_hint(text) or "")


def test_what_our_own_instructions_say_is_told_from_the_instructions() -> None:
    said = "mlpipelines: the base image has neither conda nor mamba nor micromamba"
    assert find_hint(f"Step 2/3 : RUN echo '{said}' >&2; exit 65") is None
    for line in (said, f"#7 0.239 {said}"):
        assert (find_hint(f"Step 2/3 : RUN x\n{line}\n") or "").startswith(
            "the base image has neither conda nor mamba nor micromamba. Name one that has"
        )


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("Temporary failure in name resolution", True),
        ("NewConnectionError: [Errno 111] Connection refused", True),
        ("No matching distribution found for nopkg", False),
        ("SyntaxError: invalid syntax", False),
    ],
)
def test_a_network_that_failed_is_told_from_all_else(text: str, network: bool) -> None:
    assert is_network_failure(text) is network


def test_the_error_carries_the_end_of_the_log() -> None:
    error = EnvironmentBuildError("it failed.", instruction="RUN x", log_tail=["one", "two"])
    assert str(error) == "it failed.\nEnd of the build's log:\n  one\n  two"
    assert (error.instruction, error.retryable) == ("RUN x", False)
