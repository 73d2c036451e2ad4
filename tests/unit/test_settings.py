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
