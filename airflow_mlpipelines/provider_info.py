"""What Airflow's provider discovery is told about this package."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the provider's description, in the form of Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-mlpipelines",
        "name": "ML pipelines",
        "description": "Azure-ML-style machine-learning pipelines with a cache that can be trusted.",
        "operators": [
            {
                "integration-name": "ML pipelines",
                "python-modules": ["airflow_mlpipelines.operators.steps"],
            }
        ],
        "sensors": [
            {
                "integration-name": "ML pipelines",
                "python-modules": ["airflow_mlpipelines.sensors.cache"],
            }
        ],
        "triggers": [
            {
                "integration-name": "ML pipelines",
                "python-modules": [
                    "airflow_mlpipelines.triggers.lease",
                    "airflow_mlpipelines.triggers.pod",
                ],
            }
        ],
        "config": {
            "mlpipelines": {
                "description": "Where the metadata is kept, how much of fetched data, and how values travel between tasks with "
                "``[core] xcom_backend = airflow_mlpipelines.xcom.DataReferenceXComBackend``.",
                "options": {
                    "metadata_conn_id": {
                        "description": "The Airflow connection of the metadata database, PostgreSQL, "
                        "which every worker must reach. Empty: SQLite below ``$AIRFLOW_HOME``.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "mlpipelines_metadata",
                        "default": "",
                    },
                    "blob_cache_size": {
                        "description": "How much a machine keeps of the data that it fetches from remote "
                        "datastores, below ``$AIRFLOW_HOME/mlpipelines/blobs``: bytes, or such as "
                        "``200G``. What was used longest ago goes first. Empty: a tenth of the disk, and "
                        "at most 50 GiB.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "200G",
                        "default": "",
                    },
                    "preload": {
                        "description": "What Airflow's long-running components import before they fork tasks, which "
                        "then need not: ``auto``, what every step needs, the Docker client (15 MB in each component) "
                        "where ``DOCKER_HOST`` or a socket leads to a daemon, and the Kubernetes client (45 MB) where "
                        "``KUBECONFIG``, ``~/.kube/config`` or a pod's service account leads to a cluster; ``all``, "
                        "both in any case, also for daemons and clusters that only pipelines name; ``none``, nothing, "
                        "nor is the metadata database made ready.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "all",
                        "default": "auto",
                    },
                    "python_downloads": {
                        "description": "Whether uv may download the Python that an environment wants, where a "
                        "worker has none of that version: from where ``UV_PYTHON_INSTALL_MIRROR`` says, by "
                        "default from GitHub, into where ``UV_PYTHON_INSTALL_DIR`` says.",
                        "version_added": "0.1.0",
                        "type": "boolean",
                        "example": None,
                        "default": "False",
                    },
                    "xcom_threshold_bytes": {
                        "description": "A value whose JSON is larger than this many bytes is kept in "
                        "the default datastore, and its XCom holds a reference.",
                        "version_added": "0.1.0",
                        "type": "integer",
                        "example": "1048576",
                        "default": "65536",
                    },
                    "allow_pickle": {
                        "description": "Whether tasks may hand on values that no open format holds, "
                        "as pickles. Whoever can write to the default datastore can then run code in "
                        "every task that pulls such a value. ``$MLPIPELINES_ALLOW_PICKLE`` overrides it.",
                        "version_added": "0.1.0",
                        "type": "boolean",
                        "example": None,
                        "default": "False",
                    },
                },
            },
        },
    }
