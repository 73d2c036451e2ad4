-- The metadata of pipelines lives apart from Airflow's own tables, which tasks can't reach.
CREATE DATABASE mlpipelines;
