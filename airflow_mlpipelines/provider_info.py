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
                "python-modules": ["airflow_mlpipelines.triggers.lease"],
            }
        ],
    }
