"""Data that the agent carries between datastores and a pod, past the worker and the API server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines import (
    DataReference,
    KubernetesCompute,
    Pipeline,
    PipelineData,
    PythonScriptStep,
    Workspace,
)
from airflow_mlpipelines.compute.base import Carriage, CarriedOutput, DetachedError, Stage
from airflow_mlpipelines.compute.kubernetes import attending
from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter
from airflow_mlpipelines.compute.kubernetes.channel import Channel, ChannelError
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodWatch, Reason
from airflow_mlpipelines.exceptions import DataError, StepFailedError, StoreError
from airflow_mlpipelines.storage.snapshots import make_snapshot
from airflow_mlpipelines.storage.transfer import pin_external
from tests.dags.conftest import airflow_db  # noqa: F401 - a fixture
from tests.dags.project import run_dag
from tests.integration.kubernetes.s3 import Lake, serve_s3
from tests.integration.kubernetes.steps import wait_until
from tests.integration.kubernetes.test_kubernetes_launcher import PodStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlpipelines.storage.artifact import Artifact

pytestmark = [pytest.mark.kubernetes, pytest.mark.s3]
AGENT = "mlpipelines-agent:test"
SCRIPT = Path(__file__).parents[3] / ".ci" / "agent-image.sh"
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def agent_image(cluster: Any) -> str:
    """The agent's image, built from what lies here and known to the cluster."""
    done = subprocess.run([SCRIPT, AGENT], capture_output=True, text=True, timeout=280)
    if done.returncode != 0:
        pytest.fail(f"{SCRIPT} failed:\n{done.stderr[-3000:]}")
    cluster.access.load_image(AGENT)
    return AGENT


@pytest.fixture(scope="module")
def server(cluster: Any) -> Iterator[Lake]:
    with serve_s3(cluster.host_address) as lake:
        yield lake


@pytest.fixture
def lake(server: Lake) -> Iterator[Lake]:
    """The bucket, empty."""
    yield server
    for key in sorted(server.keys()):
        server.client.delete_object(Bucket=server.bucket, Key=f"team/{key}")
    server.requests.clear()
    server.slow = 0.0


class CarriedStep(PodStep):
    """A step run whose data the agent carries."""

    agent_image: str

    def launcher(self, **fields: Any) -> Any:
        return super().launcher(**{"agent_image": self.agent_image, **fields})

    def launch(self, *argv: str, **changes: Any) -> Any:
        carriage = changes.get("carriage", Carriage())
        changes["stage"] = stage_without(self.stage, carriage)
        return super().launch(*argv, **changes)

    def carriage(self, lake: Lake, *inputs: str, **changes: Any) -> Carriage:
        """Inputs and output on the bucket, and a worker that has only the code."""
        store = lake.store()
        found = {name: (store, pin(lake, f"raw/{name}")) for name in inputs}
        output = CarriedOutput(store, "run/model", changes.pop("is_directory", None))
        return Carriage(inputs=found, outputs={"model": output}, **changes)


def stage_without(stage: Stage, carriage: Carriage) -> Stage:
    carried = {name: name for name in carriage.inputs}
    inputs = {name: path for name, path in stage.inputs.items() if name not in carried}
    return Stage(**{**vars(stage), "inputs": inputs, "carried": carried})


def pin(lake: Lake, path: str) -> Artifact:
    artifact = pin_external(lake.store(), path)
    assert artifact is not None
    return artifact


@pytest.fixture
def step(
    cluster: Any, agent_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CarriedStep]:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    made = CarriedStep(tmp_path / "step", cluster.kubeconfig, cluster.namespace)
    made.agent_image = agent_image
    left = None
    try:
        yield made
        left = made.look.remove()
    finally:
        made.look.remove()
    assert left == []


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many bytes the worker has sent to pods, and got from them."""
    counted = {"sent": 0, "received": 0}
    write, read = Channel.write, Channel.read

    def counting_write(self: Channel, data: bytes) -> None:
        counted["sent"] += len(data)
        write(self, data)

    def counting_read(self: Channel) -> Iterator[bytes]:
        for data in read(self):
            counted["received"] += len(data)
            yield data

    monkeypatch.setattr(Channel, "write", counting_write)
    monkeypatch.setattr(Channel, "read", counting_read)
    return counted


COPY = (
    "import pathlib, shutil, sys\n"
    "try: open('/mlp/inputs/table/a.bin', 'w')\n"
    "except OSError as error: print(error.strerror)\n"
    "print(sorted(p.name for p in pathlib.Path('/mlp/inputs/table').iterdir()))\n"
    "shutil.copytree('/mlp/inputs/table', '/mlp/outputs/model')\n"
)


# ---- what goes which way -------------------------------------------------------------------------


def test_data_go_between_bucket_and_pod_and_nothing_of_them_through_the_worker(
    step: CarriedStep, lake: Lake, wire: dict[str, int]
) -> None:
    large = os.urandom(8 * MEBIBYTE)
    lake.put("raw/table/a.bin", large)
    lake.put("raw/table/ü.txt", b"text")
    carriage = step.carriage(lake, "table")
    lake.requests.clear()

    lines = step.python(COPY, carriage=carriage)

    made = carriage.committed["model"]
    assert made.uri == f"{lake.root}/run/model"
    assert made.digest == pin(lake, "raw/table").digest == pin(lake, "run/model").digest
    assert (made.size, made.files, made.kind) == (8 * MEBIBYTE + 4, 2, "dir")
    assert made.step_run == step.name
    assert lake.get("run/model/a.bin") == large
    assert sorted(lake.asked("GET", by_pod=True)) == ["raw/table/a.bin", "raw/table/ü.txt"]
    assert not (step.root / "outputs" / "model").exists()
    assert wire["sent"] < 50_000
    assert wire["received"] < 20_000
    what = "8.0 MiB in 2 file(s)"
    # How far it is, is said where it takes long.
    lines = [line for line in lines if not line.endswith(" of 8.0 MiB")]
    assert lines[0] == f"Fetching input 'table': {what} from {lake.root}/raw/table"
    assert lines[1].startswith("Input 'table' is there after")
    assert lines[2:4] == ["Read-only file system", "['a.bin', 'ü.txt']"]
    assert lines[4].startswith(f"Output 'model': {what} committed to {lake.root}/run/model")


def test_code_links_and_kept_files_go_the_same_way(
    step: CarriedStep, lake: Lake, tmp_path: Path, wire: dict[str, int]
) -> None:
    source = tmp_path / "source"
    (source / "pkg").mkdir(parents=True)
    (source / "main.py").write_text(
        "import pathlib, pkg.deep\n"
        "print(pathlib.Path('data/words').read_text(), pathlib.Path('here').read_text().split())\n"
        "pathlib.Path('outputs/report').write_text('kept')\n"
        "pathlib.Path('/mlp/outputs/model').write_text('made')\n"
    )
    (source / "pkg" / "deep.py").write_text(f"TABLE = {'x' * 200_000!r}\n")
    snapshot = make_snapshot(source, lake.store())
    lake.put("raw/words", b"one two")
    carriage = step.carriage(
        lake,
        "words",
        snapshot=(lake.store(), snapshot.digest),
        links={"words": "data/words", "table": "here"},
        kept=(lake.store(), "run/_run"),
    )

    lines = step.run("python3", "main.py", carriage=carriage)

    assert "one two ['a,b', '1,2']" in lines
    assert lake.get("run/_run/outputs/report") == b"kept"
    assert carriage.committed["model"].kind == "file"
    assert not (step.root / "code/outputs/report").exists()
    assert wire["sent"] < 100_000


def test_what_only_the_worker_has_goes_through_the_worker_in_the_same_step(
    step: CarriedStep, lake: Lake
) -> None:
    lake.put("raw/other", b"from the lake")
    carriage = Carriage(inputs={"other": (lake.store(), pin(lake, "raw/other"))})

    lines = step.python(
        "print(open('/mlp/inputs/other').read(), open('/mlp/inputs/table/table.csv').read().split())\n"
        "open('/mlp/outputs/model', 'w').write('to the worker')",
        carriage=carriage,
    )

    assert lines[-1] == "from the lake ['a,b', '1,2']"
    assert (step.root / "outputs" / "model").read_text() == "to the worker"
    assert carriage.committed == {}


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_a_pipeline_on_a_bucket_works_without_the_workers_disk(
    cluster: Any,
    agent_image: str,
    lake: Lake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wire: dict[str, int],
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    extra = {"endpoint_url": lake.url, "region_name": "eu-central-1"}
    connection = {"conn_type": "aws", "login": lake.key, "password": lake.secret, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps(connection))
    (tmp_path / "mlpipelines.yaml").write_text(
        f"name: clouds\ndatastores:\n  lake: {{url: '{lake.root}', conn_id: lake}}\n"
    )
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "grow.py").write_text(
        "import pathlib, sys\n"
        "source, target = map(pathlib.Path, sys.argv[1:])\n"
        "target.write_bytes(source.read_bytes() * 2)\n"
        "pathlib.Path('outputs/note.txt').write_text('kept')\n"
    )
    workspace = Workspace.from_config(tmp_path)
    lake.put("raw/words.bin", os.urandom(2 * MEBIBYTE))
    raw = DataReference(workspace.default_datastore, "raw", "raw/words.bin", pin="version")
    once, twice = PipelineData("once"), PipelineData("twice")
    compute = KubernetesCompute(
        "cluster",
        namespace=cluster.namespace,
        image="python:3.11-slim",
        agent_image=agent_image,
        in_cluster=False,
    )
    steps = [
        PythonScriptStep(
            "grow.py",
            name=target.name,
            arguments=[source, target],
            inputs=[source],
            outputs=[target],
            compute_target=compute,
            source_directory=str(tmp_path / "code"),
        )
        for source, target in ((raw, once), (once, twice))
    ]
    lake.requests.clear()

    outcome = run_dag(Pipeline(workspace, steps, name="agent_pipeline").to_dag())

    assert outcome.state == "success", outcome.reasons
    made = outcome.outputs["twice"]["twice"]
    key = made["uri"].removeprefix(f"{lake.root}/")
    assert made["size"] == 8 * MEBIBYTE
    assert lake.get(key) == lake.get("raw/words.bin") * 4
    note = key.removesuffix("twice") + "_run/outputs/note.txt"
    assert lake.get(note) == b"kept"
    worker = {
        name.rpartition("/")[2]
        for method in ("GET", "PUT", "POST")
        for name in lake.asked(method, by_pod=False)
        if not name.startswith("snapshots/")
    }
    assert worker <= {"words.bin", "twice", "note.txt"}  # that was this test, above
    assert lake.asked("GET", by_pod=False).count("raw/words.bin") == 1
    # Of 14 MiB of data: this is the runtime package, also where a delivery was repeated on a slow machine.
    assert wire["sent"] + wire["received"] < 2 * MEBIBYTE


# ---- credentials ---------------------------------------------------------------------------------


def test_credentials_are_where_the_agent_is_and_nowhere_else(step: CarriedStep, lake: Lake) -> None:
    running = step.start(
        "import os, pathlib, time\n"
        "print(os.path.exists('/mlp-job'), sorted(os.listdir('/mlp')), 'AWS' in str(os.environ))\n"
        "pathlib.Path('/mlp/outputs/model').write_text('x')\n"
        "time.sleep(3)",
        carriage=step.carriage(lake),
    )
    pod, secrets = step.look.pod(), step.look.secrets()
    running.wait()

    mounting = [
        container.name
        for container in (*pod.spec.init_containers, *pod.spec.containers)
        if any(mount.name == "mlp-job" for mount in container.volume_mounts)
    ]
    assert mounting == ["stage", "outputs"]
    assert lake.secret not in str(pod)
    assert lake.secret not in "\n".join(step.lines)
    assert step.lines[0] == "False ['code', 'home', 'inputs', 'outputs', 'run', 'runtime'] False"
    assert [secret.metadata.owner_references[0].uid for secret in secrets] == [pod.metadata.uid]
    assert step.look.secrets() == []


def test_a_step_can_not_have_the_agent_send_its_credentials(step: CarriedStep, lake: Lake) -> None:
    carriage = step.carriage(lake, kept=(lake.store(), "run/_run"))
    with pytest.raises(DataError, match=r"step 'train', output 'model': is a symbolic link"):
        step.python(
            "import os, shutil\n"
            "os.symlink('/mlp-job/job.json', '/mlp/outputs/model')\n"
            "shutil.rmtree('outputs'); os.symlink('/mlp-job', 'outputs')\n"
            "os.symlink('/mlp-job/job.json', 'logs/x')",
            carriage=carriage,
        )
    assert lake.keys() == set()


# ---- failures, in words --------------------------------------------------------------------------


def test_an_input_that_is_gone_is_named_before_the_step_begins(
    step: CarriedStep, lake: Lake
) -> None:
    lake.put("raw/table/a.txt", b"text")
    carriage = step.carriage(lake, "table")
    lake.client.delete_object(Bucket=lake.bucket, Key="team/raw/table/a.txt")

    with pytest.raises(DataError, match=r"step 'train', input 'table': s3://.*/raw/table is gone"):
        step.python(COPY, carriage=carriage)
    assert step.handle.get() is None


def test_an_input_that_is_another_one_by_now_is_refused(step: CarriedStep, lake: Lake) -> None:
    lake.put("raw/table/a.txt", b"text")
    carriage = step.carriage(lake, "table")
    lake.put("raw/table/a.txt", b"texT")

    with pytest.raises(DataError, match=r"input 'table': fetched data have the digest blake3:"):
        step.python(COPY, carriage=carriage)


def test_credentials_that_the_store_refuses_are_told_with_store_and_port(
    step: CarriedStep, lake: Lake
) -> None:
    lake.put("raw/table/a.txt", b"text")
    carriage = step.carriage(lake, "table")
    wrong = lake.store(key="AKIANOBODY", secret="wrong")
    table = carriage.inputs["table"][1]
    with pytest.raises(
        DataError, match=r"input 'table': datastore 'lake': .*Check the credentials"
    ) as failure:
        step.python(COPY, carriage=Carriage(inputs={"table": (wrong, table)}))
    assert "wrong" not in str(failure.value)


def test_an_output_that_was_not_made_fails_the_step(step: CarriedStep, lake: Lake) -> None:
    with pytest.raises(DataError, match=r"step 'train', output 'model': was not made"):
        step.python("", carriage=step.carriage(lake))
    assert step.look.pods() == [] or step.look.pod().metadata.deletion_timestamp is not None


def test_an_output_that_goes_to_a_bucket_that_is_not_there_is_told(
    step: CarriedStep, lake: Lake
) -> None:
    from airflow_mlpipelines.storage.stores import open_store

    nowhere = open_store("typo", "s3://nowhere-at-all", credentials=lake.credentials())
    carriage = Carriage(outputs={"model": CarriedOutput(nowhere, "run/model", None)})
    with pytest.raises(
        DataError,
        match=r"output 'model': datastore 'typo': s3://nowhere-at-all/run/model can't be written",
    ):
        step.python("open('/mlp/outputs/model', 'w').write('x')", carriage=carriage)
    assert step.launcher().release(step.name, step.handle)  # there is no later try


def test_what_a_store_refuses_is_sent_by_the_next_try_with_its_own_credentials(
    step: CarriedStep, lake: Lake
) -> None:
    output = CarriedOutput(lake.store(key="AKIANOBODY", secret="expired"), "run/model", None)
    with pytest.raises(StoreError, match=r"output 'model': .*Check the credentials"):
        step.python(
            "print('once'); open('/mlp/outputs/model', 'w').write('made')",
            carriage=Carriage(outputs={"model": output}),
        )
    assert step.lines == ["once"]
    retry, carriage = step.launcher(), step.carriage(lake)
    assert retry.recover(step.name, step.handle)

    step.python("raise SystemExit('again')", launcher=retry, carriage=carriage)

    assert carriage.committed["model"].size == 4
    assert lake.get("run/model") == b"made"


def test_a_program_that_failed_is_told_and_not_the_store_that_is_away(
    step: CarriedStep, lake: Lake
) -> None:
    carriage = Carriage(kept=(lake.store(key="AKIANOBODY", secret="expired"), "run/_run"))
    with pytest.raises(StepFailedError, match="exit code 3"):
        step.python("import sys; open('logs/why', 'w').close(); sys.exit(3)", carriage=carriage)


def test_a_step_that_fails_commits_nothing_but_keeps_its_files(
    step: CarriedStep, lake: Lake
) -> None:
    carriage = step.carriage(lake, kept=(lake.store(), "run/_run"))
    with pytest.raises(StepFailedError, match="exit code 3"):
        step.python(
            "import sys; open('logs/why', 'w').write('because')\n"
            "open('/mlp/outputs/model', 'w').close(); sys.exit(3)",
            carriage=carriage,
        )
    assert lake.keys() == {"run/_run/logs/why"}


def test_an_image_that_is_no_agent_is_told(step: CarriedStep, lake: Lake) -> None:
    launcher = step.launcher(agent_image="python:3.11-slim")
    with pytest.raises(StepFailedError, match=r"agent_image.*images/agent/Dockerfile"):
        step.python("", launcher=launcher, carriage=step.carriage(lake))


# ---- data that take long -------------------------------------------------------------------------


def test_a_step_is_left_to_itself_while_its_inputs_are_fetched_and_committed_by_the_next_worker(
    step: CarriedStep, lake: Lake
) -> None:
    lake.put("raw/table/a.txt", b"text")
    carriage = step.carriage(lake, "table")
    lake.slow = 8.0
    launcher = step.launcher(defer_after_seconds=1)
    options: dict[str, Any] = {"launcher": launcher, "carriage": carriage, "detach": True}
    lines: list[str] = []
    watches = []
    while (watch := find_watch(step, lines, **options)) is not None:
        watches.append(watch)
        was_fetching = not any("is there" in line for line in lines)
        awaiter = PodAwaiter(PodWatch.from_dict(watch), partial(keep_line, lines))
        news = asyncio.run(awaiter.wait())
        carriage = step.carriage(lake, "table")
        options |= {"carriage": carriage, "news": news.to_dict()}
        options["launcher"] = step.launcher(defer_after_seconds=1)

    assert was_fetching
    assert news.reason is Reason.ENDED
    assert lake.secret not in str(watches)
    told = {line.partition(": ")[0].partition(" is there")[0] for line in lines}
    own = {"Read-only file system", "['a.txt']"}
    assert told == {"Fetching input 'table'", "Input 'table'", "Output 'model'", *own}
    assert len(lines) == len(told)
    assert carriage.committed["model"].files == 1
    assert step.look.secrets() == []


def find_watch(step: CarriedStep, lines: list[str], **options: Any) -> dict[str, Any] | None:
    """Run the step; return what to wait for if it is left to itself, and None if it has ended."""
    try:
        step.python(COPY, **options)
    except DetachedError as detached:
        return detached.watch
    else:
        return None
    finally:
        lines += step.lines


def keep_line(lines: list[str], _time: str, line: str) -> None:
    lines.append(line)


def test_a_pod_that_no_node_takes_yet_is_left_to_itself_with_all_of_its_logs_unread(
    step: CarriedStep, lake: Lake
) -> None:
    launcher = step.launcher(node_selector={"never": "there"}, defer_after_seconds=1)
    with pytest.raises(DetachedError) as left:
        step.python("", launcher=launcher, carriage=step.carriage(lake), detach=True)
    watch = PodWatch.from_dict(left.value.watch)
    assert watch.awaits is Awaited.END
    assert watch.logs == {step.look.name: None, f"{step.look.name}/stage": None}
    later = step.launcher()
    assert later.recover(step.name, step.handle)
    assert later.release(step.name, step.handle)


def test_a_step_that_is_killed_while_its_inputs_are_fetched_is_gone_at_once(
    step: CarriedStep, lake: Lake
) -> None:
    lake.put("raw/table/a.txt", b"text")
    carriage, launcher = step.carriage(lake, "table"), step.launcher()
    lake.slow = 20.0
    threading.Thread(
        target=lambda: (
            wait_until(lambda: lake.asked("GET", by_pod=True), "it fetches"),
            launcher.kill(),
        )
    ).start()
    with pytest.raises(StepFailedError, match="killed"):
        step.python(COPY, launcher=launcher, carriage=carriage)
    wait_until(lambda: not step.look.pods(), "its pod is gone", seconds=15)


# ---- connections that break ----------------------------------------------------------------------


def test_a_commit_whose_answer_was_lost_is_asked_for_again_and_done_once(
    step: CarriedStep, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = Channel.read, []

    def read(self: Channel) -> Iterator[bytes]:
        for chunk in real(self):
            if b'"result"' in chunk and not lost:
                lost.append(chunk)
                raise ChannelError("cut")
            yield chunk

    monkeypatch.setattr(Channel, "read", read)
    carriage = step.carriage(lake)
    step.python("open('/mlp/outputs/model', 'w').write('made')", carriage=carriage)

    assert lost
    assert carriage.committed["model"].size == 4
    assert lake.asked("PUT", by_pod=True) == ["run/model"]


def test_a_retry_commits_what_its_lost_worker_did_not(
    step: CarriedStep, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake.put("raw/table/a.txt", b"text")

    def lose(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(attending, "collect", lose)
        patch.setattr(attending, "discard", lambda *_, **__: None)
        patch.setattr(step.handle, "set", lambda _: None)
        with pytest.raises(SystemExit):
            step.python(COPY, carriage=step.carriage(lake, "table"))
    step.handle.set({"launcher": "kubernetes", "pod": step.look.pod().metadata.uid})
    retry, carriage = step.launcher(), step.carriage(lake, "table")
    assert retry.recover(step.name, step.handle)

    step.python("", launcher=retry, carriage=carriage)

    assert carriage.committed["model"].files == 1
    assert lake.asked("GET", by_pod=True) == ["raw/table/a.txt"]
