# Airflow with this package, for docker-compose.yml.
FROM apache/airflow:3.3.2-python3.12

USER root
RUN apt-get update && apt-get install -y --no-install-recommends curl && rm -rf /var/lib/apt/lists/*
USER airflow

COPY --chown=airflow pyproject.toml README.md constraints.txt /opt/build/
COPY --chown=airflow airflow_mlpipelines /opt/build/airflow_mlpipelines
COPY --chown=airflow dags /opt/build/dags
RUN pip install --no-cache-dir --constraint /opt/build/constraints.txt \
    "/opt/build[docker,s3,postgres,celery,demo]" && python -m compileall -q "$(python -c 'import airflow; print(airflow.__path__[0])')"
