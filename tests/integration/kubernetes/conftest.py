"""A real Kubernetes cluster, and a look at it that is not our own code's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parts import missing


@dataclass(frozen=True)
class TestCluster:
    """A cluster that tests may use.

    Attributes:
        kubeconfig: The file that says how to reach it.
        namespace: Where the tests' pods go.
    """

    __test__ = False

    kubeconfig: Path
    namespace: str


@pytest.fixture(scope="session")
def cluster() -> TestCluster:
    """The cluster that ``KUBECONFIG`` names."""
    named = os.environ.get("KUBECONFIG")
    if not named or not Path(named).is_file():
        missing("KUBECONFIG names no Kubernetes cluster")
    return TestCluster(Path(str(named)), "default")
