"""Run configurations and environments in files: there and back, and as Azure ML's SDK v1 wrote them."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from airflow_mlpipelines import (
    Environment,
    Mpi,
    Pipeline,
    PythonScriptStep,
    PyTorch,
    Resources,
    RunConfiguration,
    TensorFlow,
    Workspace,
)
from airflow_mlpipelines.exceptions import DefinitionError

AZURE = Path(__file__).parent / "azureml_files"
CONDA = {"channels": ["conda-forge"], "dependencies": ["python=3.11", {"pip": ["numpy==2.1"]}]}


def load_quietly(path: Path, name: str | None = None) -> RunConfiguration:
    """Load a configuration of which nothing is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return RunConfiguration.load(path, name)


# ---- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        Environment("image", image="registry.example.com/team/train:1"),
        Environment("own", dockerfile="FROM python:3.12\nRUN echo ä\n", apt=["libgomp1"]),
        Environment("pip", python_version="3.12", pip=["numpy==2.1", "-c /constraints.txt"]),
        Environment("conda", image="condaforge/mambaforge", conda=CONDA),
        Environment("mixed", pip=["x"], conda=CONDA, environment_variables={"LEVEL": "info"}),
        Environment(environment_variables={"A": "1"}),
    ],
    ids=lambda environment: str(environment.name),
)
def test_an_environment_comes_back_from_its_directory_and_from_a_run_configuration(
    environment: Environment, tmp_path: Path
) -> None:
    environment.save_to_directory(tmp_path / "environment")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Environment.load_from_directory(tmp_path / "environment").spec == environment.spec
    for apart in (False, True):
        RunConfiguration(environment=environment).save(tmp_path, "x", apart)
        found = load_quietly(tmp_path, "x").environment
        assert found is not None
        assert found.spec == environment.spec


def test_a_chief_which_azure_ml_s_files_have_no_place_for_is_not_dropped_in_silence(
    tmp_path: Path,
) -> None:
    made = RunConfiguration("train.py", distributed=TensorFlow(2, 1, chief=True))
    with pytest.raises(DefinitionError, match="has no place for it"):
        made.save(tmp_path, "train")


NODES = (1, 2, 3)
PER_NODE = (1, 4)


@pytest.mark.parametrize(
    "distributed",
    [
        None,
        PyTorch(),
        *(Mpi(nodes, each) for nodes in NODES for each in PER_NODE),
        *(PyTorch(nodes, each) for nodes in NODES for each in PER_NODE),
        *(
            TensorFlow(nodes * each, servers, nodes=nodes)
            for nodes in NODES
            for each in PER_NODE
            for servers in (0, 2)
        ),
    ],
    ids=repr,
)
def test_a_run_configuration_comes_back_from_its_file(distributed: Any, tmp_path: Path) -> None:
    saved = RunConfiguration(
        "train.py",
        ["--rate", "0.1"],
        target="gpu-cluster",
        environment_variables={"LEVEL": "info"},
        distributed=distributed,
        resources=Resources(cpus=1.5, memory="1000000001", gpus=2, gpu_type="A100", shm_size="4g"),
        timeout=3600,
        command=["python", "x.py"],
    )
    file = saved.save(tmp_path, "train")
    assert file == tmp_path / ".azureml" / "train.runconfig"
    for found in (load_quietly(tmp_path, "train"), load_quietly(file)):
        assert found.to_dict() == saved.to_dict()
        assert repr(found.distributed) == repr(distributed)
        assert repr(found.resources) == repr(saved.resources)
    RunConfiguration.delete(tmp_path, "train")
    with pytest.raises(DefinitionError, match="'train' is not in"):
        RunConfiguration.load(tmp_path, "train")


def test_a_configuration_that_says_nothing_is_an_empty_file(tmp_path: Path) -> None:
    file = RunConfiguration().save(tmp_path / "x.yml")
    assert yaml.safe_load(file.read_text()) == {}
    assert load_quietly(file).to_dict() == {}


def test_an_environment_is_not_written_over_another_one_unless_asked(tmp_path: Path) -> None:
    Environment("one", dockerfile="FROM x\n", conda=CONDA).save_to_directory(tmp_path)
    with pytest.raises(DefinitionError, match="overwrite=True"):
        Environment("two", image="y").save_to_directory(tmp_path)
    Environment("two", image="y").save_to_directory(tmp_path, overwrite=True)
    assert Environment.load_from_directory(tmp_path).spec == Environment("two", image="y").spec


# ---- what Azure ML's SDK has written -----------------------------------------------------------


@pytest.mark.parametrize("project", ["project", "apart"])
def test_a_run_configuration_of_the_sdk_means_the_same_here(project: str) -> None:
    found = load_quietly(AZURE / project, "train")
    assert (found.script, found.arguments) == ("train.py", ["--rate", "0.1"])
    assert (found.target, found.timeout) == ("cpu-cluster", 3600)
    assert found.environment_variables == {"LEVEL": "debug"}
    assert found.distributed is None
    assert found.resources is not None
    assert found.resources.spec.shm_size == 4 << 30
    assert found.environment is not None
    spec = found.environment.spec
    assert spec.name == "churn"
    # Azure ML's images are images like any others.
    assert spec.image == "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu20.04:20230509.v1"
    assert spec.environment_variables == {"LEVEL": "info"}
    assert spec.conda == {
        "name": "project_environment",
        "dependencies": ["python=3.9", {"pip": ["scikit-learn==1.3.2", "pandas"]}, "libgcc"],
        "channels": ["anaconda", "conda-forge"],
    }


def test_a_distributed_run_configuration_of_the_sdk_is_a_distribution_here() -> None:
    found = load_quietly(AZURE / "project", "gang")
    assert repr(found.distributed) == repr(PyTorch(2, 2))
    assert found.environment is not None
    assert found.environment.spec.dockerfile == "FROM ubuntu:20.04\nRUN echo\n"
    assert found.environment.spec.environment_variables == {}  # the SDK's example is nobody's wish
    assert load_quietly(AZURE / "project", "default").command == "python x.py --a 1"


def test_environments_of_the_sdk_are_environments_here() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = Environment.load_from_directory(AZURE / "environment").spec
        two = Environment.load_from_directory(AZURE / "dockerfile").spec
    assert one.image == "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu20.04:20230509.v1"
    assert one.conda is not None
    # That one manages its packages itself, so its conda file counts for nothing.
    assert (two.image, two.conda) == (None, None)
    assert str(two.dockerfile).startswith("FROM python:3.11-slim\n")


def test_what_means_nothing_here_is_told_by_its_name(tmp_path: Path) -> None:
    fields = yaml.safe_load((AZURE / "project" / ".azureml" / "train").read_text())
    fields["environment"]["spark"]["packages"] = [{"group": "x"}]
    fields["environment"]["docker"]["baseImageRegistry"] |= {
        "address": "registry.example.com",
        "username": "me",
        "password": "c4n4ry",
    }
    fields["amlcompute"]["vmSize"] = "STANDARD_NC6"
    fields["history"]["directoriesToWatch"] = ["logs", "plots"]
    (tmp_path / "train.runconfig").write_text(yaml.safe_dump(fields))
    (tmp_path / ".azureml").mkdir()
    (tmp_path / ".azureml" / "conda_dependencies.yml").write_text(yaml.safe_dump(CONDA))
    with pytest.warns(UserWarning, match="no meaning here") as warned:
        found = RunConfiguration.load(tmp_path, "train")
    assert sorted(found.unsupported) == [
        "amlcompute.vmSize",
        "environment.docker.baseImageRegistry.password",
        "environment.docker.baseImageRegistry.username",
        "environment.spark.packages",
        "history.directoriesToWatch",
    ]
    assert "amlcompute.vmSize" in str(warned[0].message)
    assert "c4n4ry" not in str(warned[0].message)
    assert found.environment is not None
    assert str(found.environment.spec.image).startswith("registry.example.com/mcr.microsoft.com/")


# ---- what is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"targt": "x"}, r"there is no 'targt'; .* Did you mean 'target'\?"),
        ({"environment": {"docker": {"baseImag": "x"}}}, r"environment: docker: there is no 'base"),
        ({"docker": "yes"}, "docker: names with values are wanted here, not str"),
        ({"framework": "PySpark"}, r"framework is 'PySpark'; it can be \['PyTorch', 'Python', 'T"),
        ({"communicator": "OpenMPI"}, r"communicator is 'OpenMPI'; .* Did you mean 'OpenMpi'\?"),
        ({"nodeCount": 2}, "nobody would tell the nodes of each other"),
        (
            {"framework": "PyTorch", "communicator": "Gloo", "nodeCount": 2}
            | {"pytorch": {"processCount": 3}},
            "processCount is 3, which does not go evenly into nodeCount 2",
        ),
        (
            {"framework": "TensorFlow", "communicator": "ParameterServer", "nodeCount": 3}
            | {"tensorflow": {"workerCount": 2}},
            "workerCount is 2, which does not go evenly into nodeCount 3",
        ),
        ({"environment": {"docker": {"baseImage": "x", "baseDockerfile": "FROM y"}}}, "leave one"),
        ({"environment": {"python": {"condaDependenciesFile": "no.yml"}}}, "'no.yml' is not there"),
        ({"environment": {"python": {"pip": [1]}}}, "environment: pip.0: "),
        ({"docker": {"shmSize": "much"}}, "shm_size: 'much' is no size"),
        ({"environment": "no.yml"}, r"no\.yml can't be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "x.runconfig").write_text(yaml.safe_dump(fields))
    with pytest.raises(DefinitionError, match=said) as error:
        RunConfiguration.load(tmp_path, "x")
    assert str(tmp_path) in str(error.value) or "shm_size" in str(error.value)


def test_a_name_that_is_misspelt_is_guessed(tmp_path: Path) -> None:
    RunConfiguration().save(tmp_path, "training")
    with pytest.raises(DefinitionError, match=r"which has \['training'\]\. Did you mean 'training"):
        RunConfiguration.load(tmp_path, "trainin")
    with pytest.raises(DefinitionError, match="so a name is needed"):
        RunConfiguration.load(tmp_path)
    (tmp_path / "list.yml").write_text("- 1\n")
    with pytest.raises(DefinitionError, match="names with values are wanted, not list"):
        RunConfiguration.load(tmp_path / "list.yml")
    (tmp_path / "half.yml").write_text("a: [\n")
    with pytest.raises(DefinitionError, match=r"half\.yml can't be read"):
        RunConfiguration.load(tmp_path / "half.yml")


# ---- in a step ---------------------------------------------------------------------------------


def test_a_step_takes_what_it_does_not_say_itself_from_its_run_configuration(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.py").write_text("print()\n")
    shared = RunConfiguration(
        target="local",
        environment=Environment("shared", pip=["x"]),
        environment_variables={"A": "shared", "B": "shared"},
        resources=Resources(cpus=2),
        distributed=Mpi(1, 2),
        timeout=60,
    )
    one = PythonScriptStep("train.py", "one", source_directory=tmp_path, runconfig=shared)
    two = PythonScriptStep(
        "train.py",
        "two",
        source_directory=tmp_path,
        runconfig=shared,
        environment=Environment("own"),
        environment_variables={"A": "own"},
        resources=Resources(cpus=1),
        distributed=Mpi(1, 3),
        timeout=30,
    )
    graph = Pipeline(Workspace.embedded(), [one, two], name="p").graph
    made = [
        (
            step.environment.name if step.environment else None,
            step.environment_variables,
            step.resources.cpus,
            step.distributed.processes_per_node if step.distributed else None,
            step.timeout_seconds,
        )
        for step in graph.steps
    ]
    assert made == [
        ("shared", {"A": "shared", "B": "shared"}, 2, 2, 60),
        ("own", {"A": "own", "B": "shared"}, 1, 3, 30),
    ]
    with pytest.raises(DefinitionError, match=r"runconfig takes a RunConfiguration, not str\."):
        PythonScriptStep("train.py", runconfig="train")


def test_packages_from_files_are_put_on_images_and_dockerfiles(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("numpy==2.1  # fast\n\n# none\nx\n")
    (tmp_path / "conda.yml").write_text(yaml.safe_dump(CONDA))
    (tmp_path / "Dockerfile").write_text("FROM y\n")
    image = Environment.from_docker_image("e", "y", pip_requirements=tmp_path / "requirements.txt")
    assert (image.spec.image, image.spec.pip) == ("y", ("numpy==2.1", "x"))
    for dockerfile in (tmp_path / "Dockerfile", str(tmp_path / "Dockerfile"), "FROM y\n"):
        own = Environment.from_dockerfile(
            "e", dockerfile, conda_specification=str(tmp_path / "conda.yml")
        )
        assert (own.spec.dockerfile, own.spec.conda) == ("FROM y\n", CONDA)
    with pytest.raises(DefinitionError, match="not both"):
        Environment.from_docker_image("e", "y", conda_specification="c", pip_requirements="r")
    with pytest.raises(DefinitionError, match="can't be read"):
        Environment.from_dockerfile("e", str(tmp_path / "no"))


def test_the_guide_shows_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "churn").mkdir()
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path(str(Path(__file__).with_name("run_configuration_example.py")))
    assert (tmp_path / "churn" / ".azureml" / "training.runconfig").is_file()
    step = made["train"]
    assert (step.compute_target, step.environment.name) == ("gpu-cluster", "training")
    assert step.resources.spec.memory == 16 << 30
