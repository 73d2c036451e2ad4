"""Passwords and tokens in URLs: refused where a pipeline is defined, and never shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines import Environment, RunConfiguration, Workspace
from airflow_mlpipelines.definition.graph import DatastoreSpec, EnvironmentSpec
from airflow_mlpipelines.definition.url_secrets import find_secret
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "c4n4ry"
WITH_SECRETS = [
    f"--index-url https://me:{SECRET}@example.com/simple",
    f"--extra-index-url=https://:{SECRET}@example.com/simple",
    f"tool @ git+https://{SECRET}@github.com/team/tool@v1",
    f"git+https://git:{SECRET}@github.com/team/tool",
    f"tool@HTTPS://{SECRET}@example.com/tool.whl ; python_version > '3'",
    f"-i https://${{NAME}}:{SECRET}@example.com/simple",
    f"https://me:{SECRET}/with-a-slash@example.com/tool.whl",
    f"git+ssh://git:{SECRET}@github.com/team/tool",
    f"https://store.example.com/tool.whl?se=1&sig={SECRET}",
    f"--index-url https://pypi.anaconda.org/t/{SECRET}/team/simple",
]
WITHOUT = [
    "tool==1.0",
    "tool @ git+ssh://git@github.com/team/tool@v1",
    "git+https://git@github.com/team/tool@main#egg=tool",
    "--index-url https://example.com:8443/simple",
    "--index-url https://[::1]:8443/simple",
    "--index-url https://me:${INDEX_PASSWORD}@example.com/simple",
    "tool @ git+https://${TOKEN}@github.com/team/tool@v1",
    "https://example.com/t/wheel.whl",
    "tool @ file:///srv/a@b/tool.whl",
]
DATASTORES = [
    f"https://me:{SECRET}@example.com/data",
    f"sftp://me:{SECRET}@example.com/data",
    f"s3://AKIA:{SECRET}@bucket/data",
    f"https://account.blob.core.windows.net/data?sp=r&sig={SECRET}",
]


@pytest.mark.parametrize("line", WITH_SECRETS)
def test_a_secret_in_a_requirement_is_refused_and_not_shown(line: str) -> None:
    for fields in (
        {"pip": ["rich", line]},
        {"conda": {"dependencies": ["python=3.11", {"pip": [line]}]}},
    ):
        with pytest.raises(DefinitionError, match=r"environment 'own': .*~/\.netrc") as error:
            Environment("own", **fields)
        assert SECRET not in str(error.value)


@pytest.mark.parametrize("line", WITHOUT)
def test_a_name_where_one_is_needed_is_no_secret(line: str) -> None:
    assert find_secret(line) is None
    Environment("own", pip=[line])


@pytest.mark.parametrize(
    "conda",
    [
        {"channels": [f"https://me:{SECRET}@conda.example.com/team"], "dependencies": []},
        {"channels": [f"https://conda.anaconda.org/t/{SECRET}/team"], "dependencies": []},
        {"dependencies": [f"https://{SECRET}@conda.example.com/team::tool"]},
    ],
)
def test_a_secret_in_a_conda_file_is_refused(conda: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match="its conda file has a URL with a password") as error:
        Environment("own", conda=conda)
    assert SECRET not in str(error.value)
    with pytest.raises(DefinitionError, match="a password or a token"):
        Environment.from_spec(EnvironmentSpec(conda=conda))


def test_a_secret_in_a_file_of_azure_ml_is_refused_with_the_file_s_name(tmp_path: Path) -> None:
    (tmp_path / "train.runconfig").write_text(
        "script: train.py\nenvironment:\n  name: own\n  python:\n    condaDependencies:\n      dependencies:\n"
        f"      - python=3.11\n      - pip:\n        - --index-url https://me:{SECRET}@example.com/simple\n"
    )
    with pytest.raises(DefinitionError, match=r"train\.runconfig.*environment") as error:
        RunConfiguration.load(tmp_path, "train")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("url", DATASTORES)
def test_a_secret_in_the_url_of_a_datastore_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "mlpipelines.yaml").write_text(f"datastores: {{away: {{url: '{url}'}}}}\n")
    with pytest.raises(
        DefinitionError, match=r"datastore 'away' .* as the datastore's conn_id"
    ) as e:
        Workspace.from_config(tmp_path)
    assert SECRET not in str(e.value)


def test_a_secret_in_an_option_of_a_datastore_is_refused(ws: Workspace) -> None:
    options = {"client_kwargs": {"endpoint_url": f"https://me:{SECRET}@s3.example.com"}}
    spec = DatastoreSpec(name="away", url="s3://bucket", options=options)
    with pytest.raises(DefinitionError, match="conn_id") as error:
        Workspace("w", datastores={"away": spec}, computes=ws.compute_targets)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url", ["sftp://me@example.com/data", "abfss://c@a.dfs.core.windows.net/x", "hdfs://me@name/"]
)
def test_the_url_of_a_datastore_may_have_a_user(url: str, tmp_path: Path) -> None:
    (tmp_path / "mlpipelines.yaml").write_text(f"datastores: {{away: {{url: '{url}'}}}}\n")
    assert Workspace.from_config(tmp_path).datastores["away"].spec.url == url


def test_a_secret_in_the_url_of_a_registry_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlpipelines.yaml").write_text(
        f"registry: {{url: 'https://me:{SECRET}@registry.example.com/team/env'}}\n"
    )
    with pytest.raises(DefinitionError, match="type docker as conn_id") as error:
        Workspace.from_config(tmp_path)
    assert SECRET not in str(error.value)
