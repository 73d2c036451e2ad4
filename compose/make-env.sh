#!/bin/sh
# Add to .env what docker-compose.yml has to be told: passwords and keys made here, and the group of the Docker socket.
#
# What the file says already stays as it is: a database keeps its first password, and what was encrypted with a key can be
# read with no other. Only its owner may read a new file.
#
# Usage: sh compose/make-env.sh [FILE]    FILE is by default the .env beside docker-compose.yml, which it reads.
set -eu
umask 077

file="${1:-$(cd "$(dirname "$0")/.." && pwd)/.env}"
touch "$file"
chmod o-rwx "$file"
there="$(cat "$file")"

hex() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

# Compose takes `NAME=value` and `NAME: value`, with `export` before it or not. A name without a value is none to it.
value() { # name; its value in the file, or nothing
  printf '%s\n' "$there" |
    sed -n "s/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}$1[[:space:]]*[=:][[:space:]]*[\"']\{0,1\}\([^[:space:]\"'][^\"']*\).*/\2/p" |
    tail -n 1
}

added=
names=
add() { # name, value
  if [ -z "$(value "$1")" ]; then
    added="$added$1=$2
"
    names="$names $1"
  fi
}

socket="$(value DOCKER_SOCKET)"
if [ -n "$socket" ] && [ "${DOCKER_SOCKET:-$socket}" != "$socket" ]; then
  echo "$file names another DOCKER_SOCKET, which stays: to change it, remove DOCKER_SOCKET, DOCKER_GID and AIRFLOW_UID there" >&2
  exit 1
fi
socket="${socket:-${DOCKER_SOCKET:-/var/run/docker.sock}}"
# In the containers of Docker Desktop, and of a rootless daemon, the socket belongs to group 0.
group=0
user=50000
case "$(stat -L -c %u "$socket" 2>/dev/null || echo desktop)" in
  0) group="$(stat -L -c %g "$socket")" ;;
  desktop) ;;
  *) user=0 ;; # which is the daemon's own user, on the host, and the one that steps run as
esac

add AIRFLOW_UID "$user"
add AIRFLOW_PASSWORD "$(hex 12)"
add AIRFLOW_SECRET "$(hex 32)"
add AIRFLOW_FERNET_KEY "$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')"
add POSTGRES_PASSWORD "$(hex 16)"
add S3_ACCESS_KEY "$(hex 8)"
add S3_SECRET_KEY "$(hex 20)"
add DOCKER_SOCKET "$socket"
add DOCKER_GID "$group"

if [ -z "$names" ]; then
  echo "$file has everything already" >&2
  exit 0
fi
[ -z "$(tail -c 1 "$file")" ] || added="
$added" # its last line has no end
printf '%s' "$added" >>"$file"
echo "added to $file:$names" >&2
