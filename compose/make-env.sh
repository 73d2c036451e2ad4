#!/bin/sh
# Print what docker-compose.yml has to be told: passwords and keys made here, and the group of the Docker socket.
#
#   sh compose/make-env.sh > .env
set -eu

hex() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

socket="${DOCKER_SOCKET:-/var/run/docker.sock}"
# Docker Desktop and rootless daemons give their sockets to group 0, as the containers see them.
group="$(stat -L -c %g "$socket" 2>/dev/null || echo 0)"

cat <<END
AIRFLOW_PASSWORD=$(hex 12)
AIRFLOW_SECRET=$(hex 32)
AIRFLOW_FERNET_KEY=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')
POSTGRES_PASSWORD=$(hex 16)
S3_ACCESS_KEY=$(hex 8)
S3_SECRET_KEY=$(hex 20)
DOCKER_SOCKET=$socket
DOCKER_GID=$group
END
