"""The plugin that Airflow loads in all of its processes. It must stay light."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin


class MLPipelinesPlugin(AirflowPlugin):
    """Makes the package known to Airflow."""

    name = "mlpipelines"
