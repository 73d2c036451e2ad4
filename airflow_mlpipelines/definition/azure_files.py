"""The files of Azure ML's SDK v1: which keys they have, which of them mean something here, and reading them.

A key that means something here is used. One that the SDK knows and that means nothing here is reported by
name where it says something else than the SDK writes by itself. Any other key is an error.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

USED = object()
"""The key means something here."""
IDLE = object()
"""The key means nothing here, whatever it says."""
Keys = dict[str, Any]
_EMPTY: tuple[Any, ...] = (None, "", [], {})

_IMAGE_REGISTRY: Keys = {
    "address": USED,
    "username": None,
    "password": None,
    "registryIdentity": None,
}
ENVIRONMENT_KEYS: Keys = {
    "name": USED,
    "version": None,
    "environmentVariables": USED,
    "python": {
        "userManagedDependencies": USED,
        "interpreterPath": "python",
        "condaDependenciesFile": USED,
        "condaDependencies": USED,
        "baseCondaEnvironment": None,
        "version": USED,
        "pip": USED,
    },
    "docker": {
        "enabled": IDLE,
        "baseImage": USED,
        "baseDockerfile": USED,
        "buildContext": None,
        "sharedVolumes": IDLE,
        "gpuSupport": IDLE,
        "shmSize": USED,
        "arguments": [],
        "baseImageRegistry": _IMAGE_REGISTRY,
        "platform": {"os": "Linux", "architecture": "amd64"},
        "aptPackages": USED,
    },
    "spark": {"repositories": [], "packages": [], "precachePackages": True},
    "databricks": {
        "mavenLibraries": [],
        "pypiLibraries": [],
        "rcranLibraries": [],
        "jarLibraries": [],
        "eggLibraries": [],
    },
    "r": None,
    "inferencingStackVersion": None,
    "assetId": None,
}
"""The keys of an environment. What is a value here is what the SDK writes by itself."""

RUN_CONFIGURATION_KEYS: Keys = {
    "script": USED,
    "arguments": USED,
    "command": USED,
    "target": USED,
    "framework": USED,
    "communicator": USED,
    "maxRunDurationSeconds": USED,
    "nodeCount": USED,
    "priority": None,
    "environment": USED,
    "environmentVariables": USED,
    "history": {
        "outputCollection": True,
        "snapshotProject": True,
        "directoriesToWatch": ["logs"],
    },
    "spark": {
        "configuration": {
            "spark.app.name": "Azure ML Experiment",
            "spark.yarn.maxAppAttempts": 1,
        }
    },
    "docker": {"useDocker": IDLE, "sharedVolumes": IDLE, "arguments": [], "shmSize": USED},
    "hdi": {"yarnDeployMode": "cluster"},
    "tensorflow": {"workerCount": USED, "parameterServerCount": USED},
    "mpi": {"processCountPerNode": USED, "nodeCount": IDLE},
    "pytorch": {"communicationBackend": IDLE, "processCount": USED, "nodeCount": IDLE},
    "paralleltask": {"maxRetriesPerWorker": 0, "workerCountPerNode": 1, "terminalExitCodes": None},
    "resourceConfiguration": {
        "gpuCount": USED,
        "gpuType": USED,
        "cpuCount": USED,
        "memoryRequestInGB": USED,
    },
    "dataReferences": {},
    "data": {},
    "datacaches": [],
    "outputData": {},
    "sourceDirectoryDataStore": None,
    "amlcompute": {
        "vmSize": None,
        "vmPriority": None,
        "retainCluster": False,
        "name": None,
        "clusterMaxNodeCount": None,
    },
    "autoClusterComputeSpecification": None,
    "kubernetescompute": {"instanceType": None},
    "credentialPassthrough": False,
    "identity": None,
    "applicationEndpoints": {},
}
"""The keys of a run configuration, likewise."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Return what a YAML or JSON file holds.

    Raises:
        DefinitionError: It is not there, is neither, or is no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise DefinitionError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise DefinitionError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise DefinitionError(f"{path}: names with values are wanted, not {type(content).__name__}")
    return content


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a YAML file, in the order of the mapping."""
    import yaml

    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def check_keys(where: str, fields: Mapping[str, Any], known: Keys) -> list[str]:
    """Return the keys, with dots between the levels, that ask for something that does not exist here.

    Raises:
        DefinitionError: A key is one that the SDK does not know, or a section is no section.
    """
    unsupported: list[str] = []
    for key, value in fields.items():
        if key not in known:
            raise DefinitionError(
                f"{where}: there is no {key!r}; there can be {list_options(known)}.{suggest(str(key), known)}"
            )
        rule = known[key]
        if isinstance(rule, dict) and rule and value is not None:
            if not isinstance(value, dict):
                raise DefinitionError(
                    f"{where}: {key}: names with values are wanted here, not {type(value).__name__}"
                )
            unsupported += [f"{key}.{name}" for name in check_keys(f"{where}: {key}", value, rule)]
        elif rule is not USED and rule is not IDLE and value not in (rule, *_EMPTY):
            unsupported.append(key)
    return unsupported


def report_unsupported(where: str, names: Collection[str]) -> None:
    """Warn of keys that mean nothing here, if there are any."""
    if names:
        warnings.warn(
            f"{where}: these have no meaning here, and are left out: {', '.join(names)}",
            UserWarning,
            stacklevel=3,
        )


def get_section(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a section, empty if it is not there."""
    return fields.get(key) or {}


def drop_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say something."""
    return {key: value for key, value in fields.items() if value not in _EMPTY}
