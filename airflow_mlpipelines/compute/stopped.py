"""What is raised for a step that somebody or the clock has stopped: the same words on every compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import StepFailedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlpipelines.compute.base import StepLaunch


def was_killed(launch: StepLaunch, log_tail: Sequence[str] = ()) -> StepFailedError:
    """Return what to raise for a step that somebody has stopped."""
    return StepFailedError(launch.step_name, "it was killed", log_tail=log_tail)


def ran_too_long(
    launch: StepLaunch, exit_code: int | None, log_tail: Sequence[str] = ()
) -> StepFailedError:
    """Return what to raise for a step whose time was up."""
    return StepFailedError(
        launch.step_name,
        f"it ran longer than its timeout of {launch.timeout_seconds:g} seconds, and was killed",
        exit_code=exit_code,
        log_tail=log_tail,
    )
