"""Steps whose data lie on a volume that worker and pods share: mounted, and never copied."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines import (
    DataReference,
    Pipeline,
    PipelineData,
    PythonScriptStep,
    Workspace,
)
from airflow_mlpipelines.compute.base import Stage
from airflow_mlpipelines.compute.kubernetes import attending
from airflow_mlpipelines.compute.kubernetes.channel import Channel
from airflow_mlpipelines.exceptions import StepFailedError
from tests.dags.conftest import airflow_db  # noqa: F401 - a fixture
from tests.dags.project import run_dag
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep
from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kubernetes


@pytest.fixture
def volume(cluster: Any, tmp_path: Path) -> Iterator[Path]:
    """A directory of this machine that is the root of the claim ``ml-data`` in the tests' namespace."""
    if cluster.access.state is None:
        missing("only a cluster that the tests start has this machine as its node")
    name = f"mlp-test-{uuid.uuid4().hex[:8]}"
    root = tmp_path / "volume"
    root.mkdir()
    root.chmod(0o755)
    capacity = {"storage": "1Gi"}
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    cluster.core.create_persistent_volume(
        {
            "metadata": {"name": name},
            "spec": {
                **common,
                "capacity": capacity,
                "hostPath": {"path": str(root)},
                "persistentVolumeReclaimPolicy": "Retain",
            },
        }
    )
    try:
        cluster.core.create_namespaced_persistent_volume_claim(
            cluster.namespace,
            {
                "metadata": {"name": "ml-data"},
                "spec": {**common, "volumeName": name, "resources": {"requests": capacity}},
            },
        )
        yield root
    finally:
        cluster.core.delete_namespaced_persistent_volume_claim("ml-data", cluster.namespace)
        cluster.core.delete_persistent_volume(name)
        wait_until(
            lambda: (
                not cluster.core.list_namespaced_persistent_volume_claim(cluster.namespace).items
            ),
            "the claim is gone",
        )


class MountedStep(PodStep):
    """A step run with data on the volume."""

    volume: Path
    work: Path

    @property
    def stage(self) -> Stage:
        return Stage(
            root=self.work,
            code=self.work / "code",
            runtime=self.work / "runtime",
            run=self.work / "run",
            inputs={"table": self.data, "folder": self.volume / "lake" / "folder"},
            outputs={"model": self.volume / "lake" / self.name / "model"},
            outputs_root=self.volume / "lake" / self.name,
        )

    def launcher(self, **fields: Any) -> Any:
        return super().launcher(**{"shared_volumes": {str(self.volume): "ml-data"}, **fields})


@pytest.fixture
def step(
    cluster: Any, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MountedStep]:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    made = MountedStep(tmp_path / "step", cluster.kubeconfig, cluster.namespace)
    made.volume, made.work = volume, made.root
    (volume / "lake" / "folder").mkdir(parents=True)
    (volume / "lake" / "folder" / "words").write_text("one two")
    made.data = volume / "lake" / "table.csv"
    made.data.write_text("a,b\n")
    left = None
    try:
        yield made
        left = made.look.remove()
    finally:
        made.look.remove()
    assert left == []


def put_work_on_volume(step: MountedStep) -> None:
    step.work = step.volume / "work" / step.name
    for name in ("code/outputs", "code/logs", "runtime", "run"):
        (step.work / name).mkdir(parents=True)


USE = (
    "import os, pathlib, time\n"
    "print(open('/mlp/inputs/table/table.csv').read().split(), open('/mlp/inputs/folder/words').read())\n"
    "for place in ('/mlp/inputs/table/table.csv', '/mlp/inputs/folder/new'):\n"
    "  try: open(place, 'w')\n"
    "  except OSError as error: print(error.strerror)\n"
    "os.mkdir('/mlp/outputs/model')\n"
    "pathlib.Path('/mlp/outputs/model/weights').write_bytes(bytes(3 << 20))\n"
    "pathlib.Path('outputs/report').write_text('kept')\n"
    "pathlib.Path('/mlp/run/metrics.jsonl').write_text('{}')\n"
    "pathlib.Path(os.path.expanduser('~/x')).write_text('x')\n"
)
SAID = ["['a,b'] one two", "Read-only file system", "Read-only file system"]


def test_inputs_are_mounted_and_outputs_made_where_they_stay(
    step: MountedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []
    real = Channel.read

    def read(self: Channel) -> Iterator[bytes]:
        for data in real(self):
            received.append(len(data))
            yield data

    monkeypatch.setattr(Channel, "read", read)
    assert step.python(USE) == SAID
    assert (step.stage.outputs["model"] / "weights").stat().st_size == 3 << 20
    assert (step.root / "code/outputs/report").read_text() == "kept"
    assert (step.root / "run/metrics.jsonl").read_text() == "{}"
    assert sum(received) < 200_000
    assert step.look.pods() == []  # nothing can write there any more


def test_with_the_work_on_the_volume_too_the_pod_is_the_step_alone(
    step: MountedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_work_on_volume(step)
    monkeypatch.setattr(Channel, "__init__", lambda *_, **__: pytest.fail("a connection"))
    running = step.start(USE + "time.sleep(3)")
    pod = step.look.pod()
    running.wait()
    assert step.lines == SAID
    assert [container.name for container in pod.spec.containers] == ["step"]
    assert not pod.spec.init_containers
    assert (step.stage.outputs["model"] / "weights").stat().st_size == 3 << 20
    assert (step.work / "code/outputs/report").read_text() == "kept"
    assert (step.work / "run/metrics.jsonl").read_text() == "{}"
    assert step.look.pods() == []


def test_a_step_on_a_volume_that_fails_is_told_and_its_pod_is_gone(step: MountedStep) -> None:
    put_work_on_volume(step)
    with pytest.raises(StepFailedError, match="exit code 3") as failure:
        step.python("print('because'); raise SystemExit(3)")
    assert failure.value.log_tail == ("because",)
    assert step.look.pods() == []


def test_a_retry_adopts_a_pod_that_is_the_step_alone(
    step: MountedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_work_on_volume(step)

    def lose(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(attending, "has_helpers", lambda _: False)
        patch.setattr(attending, "belongs_to", lose)
        patch.setattr(attending, "discard", lambda *_, **__: None)
        patch.setattr(attending.PodAttendant, "_await_removal", lambda *_: None)
        with pytest.raises(SystemExit):
            step.python("print('first'); open('/mlp/outputs/model', 'w').write('made')")
    step.handle.set({"launcher": "kubernetes", "pod": step.look.pod().metadata.uid})
    retry = step.launcher()
    assert retry.recover(step.name, step.handle)
    assert step.python("print('second')", launcher=retry) == ["first"]
    assert step.stage.outputs["model"].read_text() == "made"


def test_a_claim_that_is_not_there_is_named_and_not_waited_for(
    step: MountedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_mlpipelines.compute.kubernetes.starting._CLAIM_SECONDS", 1.0)
    launcher = step.launcher(shared_volumes={str(step.volume): "ml-typo/team"})
    with pytest.raises(
        StepFailedError, match=r"no PersistentVolumeClaim 'ml-typo'.*shared_volumes"
    ) as failure:
        step.python("", launcher=launcher)
    assert not failure.value.retryable


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_a_pipeline_on_a_volume_copies_nothing(
    cluster: Any, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    monkeypatch.setenv("MLPIPELINES_WORK_DIR", str(volume / "work"))
    monkeypatch.setattr(Channel, "__init__", lambda *_, **__: pytest.fail("a connection"))
    (tmp_path / "mlpipelines.yaml").write_text(
        "name: volumes\ncomputes:\n"
        f"  cluster: {{type: kubernetes, namespace: {cluster.namespace}, image: 'python:3.11-slim', "
        f"in_cluster: false, shared_volumes: {{'{volume}': ml-data}}}}\n"
        f"datastores:\n  lake: {{url: 'file://{volume}/lake'}}\n"
    )
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "grow.py").write_text(
        "import pathlib, sys\n"
        "from airflow_mlpipelines import Run\n"
        "source, target = map(pathlib.Path, sys.argv[1:])\n"
        "target.write_bytes(source.read_bytes() * 2)\n"
        "Run.get_context().log('size', target.stat().st_size)\n"
    )
    (volume / "lake").mkdir()
    (volume / "lake" / "words").write_text("one ")
    workspace = Workspace.from_config(tmp_path)
    raw = DataReference(workspace.default_datastore, "raw", "words")
    once, twice = PipelineData("once"), PipelineData("twice")
    steps = [
        PythonScriptStep(
            "grow.py",
            name=target.name,
            arguments=[source, target],
            inputs=[source],
            outputs=[target],
            compute_target="cluster",
            source_directory=str(tmp_path / "code"),
        )
        for source, target in ((raw, once), (once, twice))
    ]

    outcome = run_dag(Pipeline(workspace, steps, name="volume_pipeline").to_dag())

    assert outcome.state == "success", outcome.reasons
    made = outcome.outputs["twice"]["twice"]["uri"].removeprefix("file://")
    with open(made) as file:
        assert file.read() == "one " * 4
    assert os.stat(made).st_uid == (os.getuid() or 1000)
