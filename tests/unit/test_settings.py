"""Settings that the environment decides."""

from __future__ import annotations

import pytest

from airflow_mlpipelines import settings


@pytest.mark.parametrize("said", ["1", "true", "Yes", " on "])
def test_the_environment_allows_pickles(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPELINES_ALLOW_PICKLE", said)
    assert settings.allow_pickle(configured=False)


@pytest.mark.parametrize("said", ["0", "false", "", "perhaps"])
def test_the_environment_forbids_pickles(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPELINES_ALLOW_PICKLE", said)
    assert not settings.allow_pickle(configured=True)


@pytest.mark.parametrize("configured", [True, False])
def test_without_a_word_in_the_environment_airflow_decides(
    configured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLPIPELINES_ALLOW_PICKLE", raising=False)
    assert settings.allow_pickle(configured=configured) is configured


def test_two_airflows_of_one_user_agree_on_who_has_which_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLPIPELINES_GPU_LOCKS", raising=False)
    monkeypatch.setenv("AIRFLOW_HOME", "/one")
    of_one = settings.gpu_lock_directory()
    monkeypatch.setenv("AIRFLOW_HOME", "/other")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert settings.gpu_lock_directory() == of_one
    monkeypatch.setenv("MLPIPELINES_GPU_LOCKS", "/shared/locks")
    assert str(settings.gpu_lock_directory()) == "/shared/locks"


def test_what_is_kept_and_what_steps_work_in_can_lie_outside_of_airflow_s_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLPIPELINES_WORK_DIR", raising=False)
    monkeypatch.setenv("AIRFLOW_HOME", "/opt/airflow")
    monkeypatch.delenv("MLPIPELINES_HOME", raising=False)
    assert str(settings.blob_cache_directory()) == "/opt/airflow/mlpipelines/blobs"

    monkeypatch.setenv("MLPIPELINES_HOME", "/var/lib/mlpipelines")

    assert str(settings.blob_cache_directory()) == "/var/lib/mlpipelines/blobs"
    assert str(settings.work_directory()) == "/var/lib/mlpipelines/work"
