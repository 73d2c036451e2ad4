"""The log of a build, and the error that a failed build ends in."""

from __future__ import annotations

import re
import subprocess
from collections import deque
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.build_failures import find_hint, is_network_failure
from airflow_mlpipelines.exceptions import EnvironmentBuildError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.compute.base import Emit

_TAIL_LINES = 30
_SHOWN_CHARACTERS = 500
_SHOWN_INSTRUCTION = 200
_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NOISE = re.compile(r"^( ---> |Removing intermediate container |#\d+ (DONE|CACHED|sha256:)|\s*$)")
_CLASSIC_STEP = re.compile(r"^Step \d+/\d+ : (.*)$")
_BUILDKIT_STEP = re.compile(r"^#(\d+) \[[^\]]*\d+/\d+\] (.*)$")
_BUILDKIT_ERROR = re.compile(r"^#(\d+) ERROR:? (.*)$")
_EXIT_CODE = re.compile(r"(?:returned a non-zero code|exit code): (\d+)")


class BuildLog:
    """The log of a build, line by line: handed on, its end kept, and the instruction at work known."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._rest = ""
        self._steps: dict[str, str] = {}
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.instruction: str | None = None

    def feed(self, text: str) -> None:
        """Take a piece of the log, which may end in the middle of a line."""
        *lines, self._rest = (self._rest + text).replace("\r\n", "\n").split("\n")
        for line in lines:
            self._take(line)

    def finish(self) -> None:
        """Take what is left of a log that ends without a line end."""
        if self._rest:
            self._take(self._rest)
            self._rest = ""

    def _take(self, raw: str) -> None:
        line = _CODES.sub("", raw).rpartition("\r")[2].rstrip()
        if match := _CLASSIC_STEP.match(line):
            self.instruction = match[1]
        elif match := _BUILDKIT_STEP.match(line):
            self._steps[match[1]] = match[2]
        elif match := _BUILDKIT_ERROR.match(line):  # several instructions may be at work at once
            self.instruction = self._steps.get(match[1])
        if _NOISE.match(line):
            return
        self.tail.append(line[:_SHOWN_CHARACTERS])
        self._emit(line)


def run_builder(command: Sequence[str], *, env: Mapping[str, str], log: BuildLog) -> int:
    """Return the exit code of a program that builds; what it prints is the log. It ends with its caller."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        for piece in process.stdout or ():
            log.feed(piece)
        code = process.wait()
    finally:
        process.kill()  # where somebody interrupts us, so that the build ends too
        process.wait()
    log.finish()
    return code


def build_failure(
    named: str, log: BuildLog, said: str, *, retryable: bool = False
) -> EnvironmentBuildError:
    """Return the error that names the instruction, what to do, and the end of the log."""
    text = "\n".join([*log.tail, said])
    code = _EXIT_CODE.search(said)
    hint = find_hint(text)
    what = said.strip() if code is None else f"it ended with exit code {code[1]}"
    if log.instruction is None:
        message = f"{named} can't be built: {hint or what}."
    else:
        cut = "…" if len(log.instruction) > _SHOWN_INSTRUCTION else ""
        instruction = f"{log.instruction[:_SHOWN_INSTRUCTION]}{cut}"
        message = f"{named} can't be built: {hint or what}. The instruction was: {instruction}"
    return EnvironmentBuildError(
        message,
        instruction=log.instruction,
        log_tail=tuple(log.tail),
        retryable=retryable or is_network_failure(text),
    )
