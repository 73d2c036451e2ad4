"""What a worker notes of its launch in Airflow's task state store, and how often it asks for it."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.operators.carrying_out import TaskStateHandle

pytestmark = pytest.mark.airflow


class Store:
    """Airflow's store, of which every call is a request to the API server."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.reads = 0
        self.interrupts = False

    def get(self, key: str) -> str | None:
        self.reads += 1
        return self.values.get(key)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value
        if self.interrupts:
            raise KeyboardInterrupt


def handle_of(store: Store, attempt: int = 0) -> TaskStateHandle:
    return TaskStateHandle({"task_state_store": store}, attempt)  # type: ignore[typeddict-item]


def test_airflow_is_asked_once_for_what_an_earlier_try_has_noted() -> None:
    store = Store()
    handle_of(store).set({"pod": "one"})
    handle = handle_of(store)
    assert [handle.get(), handle.get()] == [{"pod": "one"}, {"pod": "one"}]
    assert store.reads == 1
    handle.set({"pod": "two"})
    assert handle.get() == {"pod": "two"}
    handle.set(None)
    assert handle.get() is None
    assert store.reads == 1
    assert handle_of(store).get() is None


def test_what_was_noted_last_is_asked_for_where_noting_it_was_interrupted() -> None:
    store = Store()
    handle = handle_of(store)
    assert handle.get() is None
    store.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        handle.set({"pod": "one"})
    assert handle.get() == {"pod": "one"}


def test_a_step_that_was_cleared_begins_without_a_note() -> None:
    store = Store()
    handle_of(store, attempt=0).set({"pod": "one"})
    assert handle_of(store, attempt=1).get() is None
