"""Pages of the Airflow UI, served by the api-server."""
