# Airflow with this package: for docker-compose.yml, and for the official Helm chart.
ARG PYTHON_VERSION=3.12
FROM apache/airflow:3.3.2-python${PYTHON_VERSION}

COPY --chown=airflow:0 pyproject.toml README.md constraints.txt /opt/build/
COPY --chown=airflow:0 airflow_mlpipelines /opt/build/airflow_mlpipelines
COPY --chown=airflow:0 dags /opt/build/dags
RUN pip install --no-cache-dir --constraint /opt/build/constraints.txt \
    "/opt/build[docker,kubernetes,s3,postgres,celery]" \
    && python -m compileall -q "$(python -c 'import airflow; print(airflow.__path__[0])')"
