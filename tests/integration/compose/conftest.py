"""The whole deployment of docker-compose.yml, once for the tests of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.compose.deployment import (
    BUILD_SECONDS,
    Deployment,
    find_programs,
    make_images,
)
from tests.parts import find_compose, require_docker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give whoever comes first the time to build programs and images."""
    here = __name__.rpartition(".")[0].replace(".", "/")
    for item in items:
        if here in item.nodeid:
            item.add_marker(pytest.mark.timeout(3 * BUILD_SECONDS))


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    require_docker()
    programs = find_programs()
    make_images(programs)
    folder: Path = tmp_path_factory.mktemp("compose")
    made = Deployment(find_compose(), folder)
    try:
        made.start()
        yield made
    finally:
        made.remove()
