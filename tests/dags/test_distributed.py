"""Steps of several processes, in whole pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_mlpipelines import (
    DockerCompute,
    KubernetesCompute,
    LocalCompute,
    Mpi,
    Pipeline,
    PipelineData,
    PythonScriptStep,
    PyTorch,
    Resources,
    TensorFlow,
    Workspace,
)
from airflow_mlpipelines.exceptions import DefinitionError
from tests.dags.project import run_dag
from tests.integration.docker.conftest import IMAGE, docker_cli
from tests.parts import missing, require_docker

TRAIN = """
import os, pathlib, sys

print("this is rank", os.environ["RANK"])
if os.environ["RANK"] == "0":
    pathlib.Path(sys.argv[1]).write_text("a model of " + os.environ["WORLD_SIZE"])
"""


# [start distributed]
def define_training(folder: str, processes: int, compute: object = None) -> PythonScriptStep:
    """Return a step that trains with several processes, one for each GPU."""
    model = PipelineData("model")
    return PythonScriptStep(
        "train.py",
        arguments=[model],
        outputs=[model],
        source_directory=folder,
        compute_target=compute,
        distributed=PyTorch(processes_per_node=processes),
    )


# [end distributed]


# [start nodes]
def define_cluster_training(folder: str, compute: object) -> PythonScriptStep:
    """Return a step that trains on four nodes with eight GPUs each."""
    model = PipelineData("model")
    return PythonScriptStep(
        "train.py",
        arguments=[model],
        outputs=[model],
        source_directory=folder,
        compute_target=compute,
        resources=Resources(gpus=8, memory="400G"),
        distributed=PyTorch(nodes=4, processes_per_node=8),
    )


# [end nodes]
def pipeline(folder: Path, name: str, processes: int, compute: object = None) -> Pipeline:
    (folder / "train.py").write_text(TRAIN)
    train = define_training(str(folder), processes, compute)
    return Pipeline(Workspace.from_config(), [train], name=name)


@pytest.mark.airflow
@pytest.mark.usefixtures("airflow_db")
def test_processes_of_a_local_step_work_as_one_and_their_number_counts(tmp_path: Path):
    first = run_dag(pipeline(tmp_path, "gang", 2).to_dag())
    assert first.steps == {"train": "ran"}
    model = Path(first.outputs["train"]["model"]["uri"].removeprefix("file://"))
    assert model.read_text() == "a model of 2"
    logs = sorted(model.parent.rglob("std_log_process_*.txt"))
    assert [log.read_text() for log in logs] == ["this is rank 0\n", "this is rank 1\n"]

    assert run_dag(pipeline(tmp_path, "gang", 2).to_dag()).steps == {"train": "reused"}
    more = run_dag(pipeline(tmp_path, "gang", 3).to_dag())

    assert more.steps == {"train": "ran"}
    assert "distribution changed" in more.reasons["train"]


@pytest.mark.airflow
@pytest.mark.docker
@pytest.mark.usefixtures("airflow_db")
def test_processes_in_one_container_work_as_one(tmp_path: Path):
    require_docker()
    if not docker_cli("images", "-q", IMAGE):
        missing(f"the Docker daemon has no image {IMAGE} (.ci/python-image.sh makes one)")
    compute = DockerCompute("docker", image=IMAGE)

    outcome = run_dag(pipeline(tmp_path, "gang_in_docker", 2, compute).to_dag())

    model = Path(outcome.outputs["train"]["model"]["uri"].removeprefix("file://"))
    assert model.read_text() == "a model of 2"


@pytest.mark.airflow
@pytest.mark.docker
@pytest.mark.usefixtures("airflow_db")
def test_nodes_in_containers_work_as_one(tmp_path: Path):
    require_docker()
    if not docker_cli("images", "-q", IMAGE):
        missing(f"the Docker daemon has no image {IMAGE} (.ci/python-image.sh makes one)")
    compute = DockerCompute("docker", image=IMAGE)
    made = pipeline(tmp_path, "gang_of_nodes", 1, compute)
    made.steps[0].distributed = PyTorch(nodes=2)

    outcome = run_dag(made.to_dag())

    model = Path(outcome.outputs["train"]["model"]["uri"].removeprefix("file://"))
    assert model.read_text() == "a model of 2"
    logs = sorted(model.parent.rglob("std_log_process_*.txt"))
    assert [log.read_text() for log in logs] == ["this is rank 0\n", "this is rank 1\n"]


def test_a_cluster_takes_a_step_on_several_nodes(tmp_path: Path):
    (tmp_path / "train.py").write_text(TRAIN)
    compute = KubernetesCompute("cluster", image=IMAGE, gpus=8)
    step = define_cluster_training(str(tmp_path), compute)

    made = Pipeline(Workspace.from_config(), [step], name="on_a_cluster")

    assert made.validate() == []


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (
            DockerCompute("docker", image=IMAGE, network_mode="host"),
            "compute 'docker' has network_mode 'host'",
        ),
        (
            DockerCompute("docker", image=IMAGE, gpus=3),
            "asks for 2 GPUs on each of 2 nodes, but compute 'docker' is one Docker host with 3",
        ),
        (
            LocalCompute("here", gpus=[0, 1, 2]),
            "asks for 2 GPUs on each of 2 nodes, but compute 'here' is one machine with 3",
        ),
    ],
)
def test_several_nodes_need_a_machine_that_can_hold_them(tmp_path: Path, compute, message):
    made = pipeline(tmp_path, "gang_of_nodes", 2, compute)
    made.steps[0].distributed = Mpi(nodes=2)
    made.steps[0].resources = Resources(gpus=2 if compute.spec.gpus else None)

    (problem,) = made.validate()

    assert message in str(problem)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PyTorch(nodes=0), "nodes is 0"),
        (lambda: Mpi(processes_per_node=True), "processes_per_node is True"),
        (lambda: TensorFlow(workers=1, parameter_servers=-1), "parameter_servers is -1"),
        (lambda: TensorFlow(workers=3, nodes=2), "3 workers can't be spread evenly over 2 nodes"),
        (lambda: PythonScriptStep("train.py", distributed="mpi"), "distributed takes Mpi"),
    ],
)
def test_a_distribution_that_can_t_be_is_refused(make, message):
    with pytest.raises(DefinitionError, match=message):
        make()
