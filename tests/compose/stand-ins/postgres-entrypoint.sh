#!/usr/bin/env bash
# What docker-compose.yml relies on of the official image's entrypoint: user, password and database from the environment,
# the SQL and shell files of /docker-entrypoint-initdb.d run once, on a new data volume.
set -euo pipefail

if [ "$(id -u)" = 0 ]; then
  chown postgres "$PGDATA"
  chmod 0700 "$PGDATA"
  exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi

user="${POSTGRES_USER:-postgres}"
database="${POSTGRES_DB:-$user}"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  : "${POSTGRES_PASSWORD:?a superuser without a password is not made}"
  initdb --pgdata="$PGDATA" --username="$user" --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 \
    --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD")
  echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
  pg_ctl --pgdata="$PGDATA" --options="-c listen_addresses=''" --wait start # on its socket alone
  [ "$database" = postgres ] || createdb --username="$user" "$database"
  for file in /docker-entrypoint-initdb.d/*; do
    case "$file" in
      *.sql) psql --set=ON_ERROR_STOP=1 --username="$user" --dbname="$database" --file="$file" ;;
      *.sh) . "$file" ;;
    esac
  done
  pg_ctl --pgdata="$PGDATA" --wait stop
fi
exec "$@" -c listen_addresses='*'
