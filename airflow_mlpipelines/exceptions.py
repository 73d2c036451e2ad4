"""Every error that this package raises on purpose; catch :class:`MLPipelinesError` for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN_PROBLEMS = 10


class MLPipelinesError(Exception):
    """Base of every error of this package."""


class DefinitionError(MLPipelinesError, ValueError):
    """A pipeline is written wrongly. Raised while its file is parsed, before anything runs."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a pipeline, and what to do about it.

    Attributes:
        message: What was found, what is allowed and the remedy, as one sentence or two.
        step: The name of the step concerned, or None if it is the pipeline as a whole.
        port: The input, output, argument or parameter concerned, if it is one.
    """

    message: str
    step: str | None = None
    port: str | None = None

    def __str__(self) -> str:
        where = []
        if self.step is not None:
            where.append(f"step {self.step!r}")
        if self.port is not None:
            where.append(self.port)
        return f"{', '.join(where)}: {self.message}" if where else self.message


class PipelineCheckError(DefinitionError):
    """All problems of one pipeline at once.

    Attributes:
        pipeline: The name of the pipeline.
        problems: Every problem found, in the order of the steps.
    """

    def __init__(self, pipeline: str, problems: Sequence[Problem]) -> None:
        self.pipeline = pipeline
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = [f"Pipeline {pipeline!r} has {count} problem{'s' if count != 1 else ''}:"]
        lines += [f"  - {problem}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if count > _SHOWN_PROBLEMS:
            lines.append(f"  … and {count - _SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


class DataError(MLPipelinesError):
    """Data can't be read, resolved, committed or trusted.

    Attributes:
        retryable: False if another try would certainly fail again in the same way.
    """

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        self.retryable = retryable
        super().__init__(message)

    def at(self, where: str) -> DataError:
        """Return the same error, with where it happened before its message."""
        return type(self)(f"{where}: {self}", retryable=self.retryable)


class StoreError(DataError):
    """A datastore can't be reached, refuses, or has lost what it was sent; whoever made the data is not to blame."""


class CacheError(MLPipelinesError):
    """The cache index itself failed. A miss is no error."""


class EnvironmentBuildError(MLPipelinesError):
    """The software environment of a step can't be resolved or built.

    Attributes:
        instruction: The instruction of the Dockerfile that failed, if one did.
        log_tail: The last lines of the build's log.
        retryable: True if something around the build failed, such as the network; the same definition
            would fail again otherwise.
    """

    def __init__(
        self,
        message: str,
        *,
        instruction: str | None = None,
        log_tail: Sequence[str] = (),
        retryable: bool = False,
    ) -> None:
        self.instruction = instruction
        self.log_tail = tuple(log_tail)
        self.retryable = retryable
        text = message
        if self.log_tail:
            text += "\nEnd of the build's log:\n" + "\n".join(f"  {line}" for line in self.log_tail)
        super().__init__(text)


class ComputeUnavailableError(MLPipelinesError):
    """The compute can't be reached, or was lost; the step's program is not to blame.

    Attributes:
        retryable: True: another try may find it well.
    """

    retryable = True


class SubmissionError(MLPipelinesError):
    """A run can't be started or followed."""


class StepFailedError(MLPipelinesError):
    """A step's program ended badly.

    Attributes:
        step: The name of the step.
        message: What happened, without the step's name and its log.
        exit_code: The exit code of the program, or None if it never ended by itself.
        log_tail: The last lines that it printed.
        retryable: False if the same program would certainly fail again in the same way.
    """

    def __init__(
        self,
        step: str,
        message: str,
        *,
        exit_code: int | None = None,
        log_tail: Sequence[str] = (),
        retryable: bool = True,
    ) -> None:
        self.step = step
        self.message = message
        self.exit_code = exit_code
        self.log_tail = tuple(log_tail)
        self.retryable = retryable
        text = f"step {step!r}: {message}"
        if self.log_tail:
            text += "\nEnd of its log:\n" + "\n".join(f"  {line}" for line in self.log_tail)
        super().__init__(text)

    def at(self, where: str) -> StepFailedError:
        """Return the same error, with where it happened before its message."""
        return StepFailedError(
            self.step,
            f"{where}: {self.message}",
            exit_code=self.exit_code,
            log_tail=self.log_tail,
            retryable=self.retryable,
        )
