"""What a trigger does besides waiting."""

from __future__ import annotations

from types import SimpleNamespace

from airflow_mlpipelines.triggers.pod import PodTrigger


def test_what_an_earlier_trigger_of_the_try_has_logged_is_put_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__LOGGING__BASE_LOG_FOLDER", str(tmp_path))
    folder = tmp_path / "dag_id=d" / "run_id=r" / "task_id=t"
    folder.mkdir(parents=True)
    (folder / "attempt=1.log").write_text("the worker's")
    (folder / "attempt=1.log.trigger.7.log").write_text("the first trigger's")
    (folder / "attempt=11.log.trigger.7.log").write_text("another try's")

    trigger = PodTrigger(watch={})
    trigger.task_instance = SimpleNamespace(
        dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1
    )

    assert trigger.task_id == "t"
    names = {file.name: file.read_text() for file in folder.iterdir()}
    assert names.pop("attempt=1.log") == "the worker's"
    assert names.pop("attempt=11.log.trigger.7.log") == "another try's"
    [(name, text)] = names.items()
    assert name.startswith("attempt=1.log.trigger.7.log.")
    assert text == "the first trigger's"


def test_a_trigger_comes_back_from_its_arguments_with_nothing_secret_in_them():
    lease = {"fingerprint": "f" * 64, "holder": "d/r/t", "token": "1234"}
    made = PodTrigger(watch={"awaits": "end"}, lease=lease)
    path, arguments = made.serialize()
    assert path == "airflow_mlpipelines.triggers.pod.PodTrigger"
    assert PodTrigger(**arguments).serialize() == (path, arguments)
    assert arguments == {"watch": {"awaits": "end"}, "lease": lease}
