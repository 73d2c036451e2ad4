#!/bin/sh
# Print what docker-compose.yml has to be told: passwords and keys made here, and the group of the Docker socket.
#
#   sh compose/make-env.sh > .env
set -eu

hex() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

socket="${DOCKER_SOCKET:-/var/run/docker.sock}"
# In the containers of Docker Desktop, and of a rootless daemon, the socket belongs to group 0.
group=0
user=50000
case "$(stat -L -c %u "$socket" 2>/dev/null || echo desktop)" in
  0) group="$(stat -L -c %g "$socket")" ;;
  desktop) ;;
  *) user=0 ;; # which is the daemon's own user, on the host, and the one that steps run as
esac

cat <<END
AIRFLOW_UID=$user
AIRFLOW_PASSWORD=$(hex 12)
AIRFLOW_SECRET=$(hex 32)
AIRFLOW_FERNET_KEY=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')
POSTGRES_PASSWORD=$(hex 16)
S3_ACCESS_KEY=$(hex 8)
S3_SECRET_KEY=$(hex 20)
DOCKER_SOCKET=$socket
DOCKER_GID=$group
END
