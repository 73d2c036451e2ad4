from __future__ import annotations

import pytest

from airflow_mlpipelines import CommandStep, Datastore, Pipeline, Workspace
from airflow_mlpipelines.definition.graph import RegistrySpec
from airflow_mlpipelines.exceptions import DefinitionError


def test_a_file_names_datastores_computes_and_environments(ws, tmp_path):
    assert ws.name == "churn"
    assert ws.default_datastore.name == "store"
    assert ws.datastores["store"].spec.url == (tmp_path / "data").as_uri()
    docker = ws.compute_targets["cpu-docker"].spec
    assert (docker.type, docker.cpus, docker.memory) == ("docker", 2, 4 << 30)
    assert ws.environments["sklearn"].spec.pip == ("scikit-learn==1.5.0",)


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("2", 2),
        ('"2"', 2),
        ("[0, 1]", ("0", "1")),
        ('"0,1"', ("0", "1")),
        ("[GPU-6a1c, MIG-77d0]", ("GPU-6a1c", "MIG-77d0")),
        ("[nvidia.com/gpu=0]", ("nvidia.com/gpu=0",)),
        ("null", None),
    ],
)
@pytest.mark.parametrize("kind", ["local", "docker"])
def test_gpus_are_a_number_or_ids(tmp_path, kind, text, gpus):
    (tmp_path / "mlpipelines.yaml").write_text(f"computes: {{c: {{type: {kind}, gpus: {text}}}}}")

    assert Workspace.from_config(tmp_path).compute_targets["c"].spec.gpus == gpus


def test_without_a_file_everything_is_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))

    ws = Workspace.embedded()

    assert list(ws.compute_targets) == ["local"]
    assert Datastore(ws, "workspaceblobstore").spec.url == (tmp_path / "mlpipelines/data").as_uri()


def test_the_environment_variable_names_the_file(ws, monkeypatch, tmp_path):
    monkeypatch.setenv("MLPIPELINES_CONFIG", str(tmp_path / "mlpipelines.yaml"))

    assert Workspace.from_config().name == "churn"


def test_a_datastore_is_got_in_all_of_azure_ml_s_ways(ws):
    names = {
        Datastore(ws, "other").name,
        Datastore(workspace=ws, name="other").name,
        Datastore.get(ws, "other").name,
    }

    assert names == {"other"}
    assert Datastore.get_default(ws).name == ws.get_default_datastore().name == "store"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("compute_targets", "gpu-clustr", "Did you mean 'gpu-cluster'?"),
        ("datastores", "stor", "Did you mean 'store'?"),
        ("environments", "tensorflow", r"which has \['sklearn'\]"),
    ],
)
def test_an_unknown_name_tells_which_there_are(ws, kind, name, message):
    with pytest.raises(DefinitionError, match=message):
        getattr(ws, kind)[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("computs: {}", "Did you mean 'computes'?"),
        ("computes: {gpu: {type: kubernets}}", "Did you mean 'kubernetes'?"),
        ("computes: {gpu: {type: docker, memroy: 4G}}", "Did you mean 'memory'?"),
        ("computes: {gpu: {type: docker, memory: much}}", "'much' is no size"),
        ("computes: {gpu: {type: docker, cpus: many}}", "cpus"),
        ("computes: {gpu: {type: local, gpus: lots}}", "neither a number of GPUs nor a list"),
        ("computes: {gpu: {type: docker, gpus: [0, 0]}}", "each one once"),
        ("computes: {gpu: {type: local, gpus: -1}}", "neither a number of GPUs nor a list"),
        ("computes: {gpu: {type: kubernetes, gpus: [0]}}", "gpus"),
        ("datastores: {store: {conn_id: aws}}", "needs a url"),
        ("datastores: {store: {url: s3://b, conid: aws}}", "Did you mean 'conn_id'?"),
        ("default_compute: gpu", "compute 'gpu' is not in"),
        ("- a list", "names with values are wanted"),
        ("registry: {conn_id: x}", "registry: it needs a url"),
        ("registry: {url: registry.example.com/env:1}", "without a tag"),
        ("registry: {url: team/env}", "registry.example.com/team/env"),
        ("registry: {url: registry.example.com/env, con_id: x}", "Did you mean 'conn_id'?"),
        ("computes: {box: {type: docker, registry: {url: 3}}}", "compute 'box': registry"),
        ("environments: {e: {apt: [a b]}}", "apt: 'a b' is no package"),
        ("a: [", "can't be read"),
    ],
)
def test_a_wrong_file_says_what_and_where(tmp_path, text, message):
    (tmp_path / "mlpipelines.yaml").write_text(text)

    with pytest.raises(DefinitionError, match=message):
        Workspace.from_config(tmp_path)


def test_a_file_that_is_named_and_not_there_is_an_error(tmp_path):
    with pytest.raises(DefinitionError, match="is not there"):
        Workspace.from_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "url", ["registry.example.com/team/env", "localhost:5000/env", "127.0.0.1:5000/env", "hub:80/e"]
)
def test_a_registry_is_that_of_every_compute_with_images(tmp_path, url):
    (tmp_path / "mlpipelines.yaml").write_text(
        f"registry: {{url: 'https://{url}/', conn_id: hub}}\n"
        "computes:\n"
        "  local: {type: local}\n"
        "  box: {type: docker, image: a}\n"
        "  own: {type: docker, image: a, registry: {url: other.example.com/env}}\n"
        "  cluster: {type: kubernetes, image: a}\n"
    )
    ws = Workspace.from_config(tmp_path)
    steps = [CommandStep(["true"], name, compute_target=name) for name in ws.compute_targets]

    computes = Pipeline(ws, steps, name="p").graph.computes

    registry = RegistrySpec(url=url, conn_id="hub")
    assert computes["box"].registry == computes["cluster"].registry == registry
    assert computes["own"].registry == RegistrySpec(url="other.example.com/env")
