-- The metadata of pipelines live apart from Airflow's own tables, which tasks can't reach.
CREATE DATABASE mlpipelines;
CREATE DATABASE mlflow;
