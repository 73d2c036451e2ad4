"""The parts of images' names, as Docker understands them."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.compute.images import ImageName, normal_registry
from airflow_mlpipelines.compute.registries import look_up_image

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("name", "registry", "repository", "version"),
    [
        ("python", "docker.io", "library/python", "latest"),
        ("python:3.12-slim", "docker.io", "library/python", "3.12-slim"),
        ("team/train:1", "docker.io", "team/train", "1"),
        ("index.docker.io/team/train", "docker.io", "team/train", "latest"),
        ("localhost/train:1", "localhost", "train", "1"),
        ("localhost:5000/train", "localhost:5000", "train", "latest"),
        ("box:5000/train:2", "box:5000", "train", "2"),
        (
            "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu20.04:20230509.v1",
            "mcr.microsoft.com",
            "azureml/openmpi4.1.0-ubuntu20.04",
            "20230509.v1",
        ),
        (f"ghcr.io/team/train@{DIGEST}", "ghcr.io", "team/train", DIGEST),
        (f"ghcr.io/team/train:1@{DIGEST}", "ghcr.io", "team/train", DIGEST),
    ],
)
def test_a_name_has_the_parts_that_docker_sees_in_it(
    name: str, registry: str, repository: str, version: str
) -> None:
    assert ImageName.parse(name) == ImageName(registry, repository, version)


@pytest.mark.parametrize(
    ("host", "registry"),
    [
        ("https://index.docker.io/v1/", "docker.io"),
        ("registry.example.com", "registry.example.com"),
        ("https://Registry.example.com:8443/team", "registry.example.com:8443"),
    ],
)
def test_a_registry_is_called_the_same_in_a_name_and_in_a_connection(
    host: str, registry: str
) -> None:
    assert normal_registry(host) == registry


def test_an_image_named_by_its_digest_is_asked_of_nobody() -> None:
    name = f"registry.invalid/team/train@{DIGEST}"
    found = look_up_image(name, conn_ids=["absent"])
    assert (found.reference, found.digest, found.problem) == (name, DIGEST, None)
