#!/usr/bin/env bash
# Leave the base images of docker-compose.yml on the Docker daemon.
#
# One that is there stays as it is, one that can be pulled is pulled. Where no registry can be reached, a stand-in of the
# same name is made from distribution packages, PyPI and Go modules: PostgreSQL and Redis in whatever version Debian has.
# A stand-in carries a label, so that it is told from the image that it stands for, and made anew when its recipe changes.
#
# Usage: images.sh FOLDER    The folder that build.sh prints.
set -euo pipefail

recipe=3 # raise it when a stand-in is made in another way
label=airflow-mlpipelines.stand-in
programs="${1:?usage: images.sh FOLDER}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
version="$(sed -n 's/^FROM apache\/airflow:\(.*\)-python.*/\1/p' "$root/Dockerfile")"
uv="${UV:-$(command -v uv || echo "$root/.venv/bin/uv")}"

is_there() { # an image that is real, or a stand-in of this recipe
  local found
  found="$(docker image inspect --format "{{index .Config.Labels \"$label\"}}" "$1" 2>/dev/null)" || return 1
  [ -z "$found" ] || [ "$found" = "$recipe" ]
}

get() { # an image; true if there is nothing left to do
  if is_there "$1"; then
    echo "image: $1 is there"
  elif ! docker image inspect "$1" >/dev/null 2>&1 && timeout 60 docker pull --quiet "$1" >/dev/null 2>&1; then
    echo "image: pulled $1"
  else
    echo "image: making a stand-in of $1"
    return 1
  fi
}

make() { # stage of the Dockerfile, image
  local compose=(docker compose)
  "${compose[@]}" version >/dev/null 2>&1 || compose=("$programs/docker-compose")
  DOCKER_BUILDKIT=1 COMPOSE_BAKE=false "${compose[@]}" --file "$work/build.yml" --project-name mlpipelines-stand-ins build --quiet "$1"
}

# Installed through a container that has uv and its cache from this machine: in a build, pip would fetch all of it anew.
install_airflow() { # image
  local cache container
  cache="$("$uv" cache dir)"
  mkdir -p "$cache"
  container="$(docker create --user 0 --entrypoint /bin/sh --volume "$uv:/usr/local/bin/uv:ro" --volume "$cache:/uv" \
    --volume "$root/pyproject.toml:/tmp/pyproject.toml:ro" --volume "$root/constraints.txt:/tmp/constraints.txt:ro" \
    --env UV_CACHE_DIR=/uv --env UV_LINK_MODE=copy --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    mlpipelines-stand-ins-airflow -euc '
      uv venv --quiet --python "$(command -v python3)" --seed /home/airflow/.local
      uv pip install --quiet --python /home/airflow/.local/bin/python --compile-bytecode --constraint /tmp/constraints.txt \
        --requirement /tmp/pyproject.toml --extra docker --extra kubernetes --extra s3 --extra postgres --extra celery apache-airflow-providers-postgres
      chown -R airflow:0 /home/airflow
    ')"
  if ! docker start --attach "$container"; then
    docker rm --force "$container" >/dev/null
    return 1
  fi
  docker commit --change 'ENTRYPOINT ["/usr/bin/dumb-init", "--", "/entrypoint"]' --change 'CMD []' --change 'USER airflow' \
    --change "LABEL $label=$recipe" "$container" "$1" >/dev/null
  docker rm "$container" >/dev/null
  docker rmi --no-prune mlpipelines-stand-ins-airflow >/dev/null
}

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
exec 9>"${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests/images.lock"
flock 9 # another session may be making the same

"$root/.ci/python-image.sh"
"$root/.ci/busybox-image.sh"
cp "$here"/stand-ins/* "$("$root/.ci/versitygw.sh")" "$work/"
for stage in postgres redis versitygw airflow; do
  case "$stage" in
    postgres) image=postgres:16 ;;
    redis) image=redis:7 ;;
    versitygw) image="$(sed -n 's/.*image: \(.*versitygw.*\)/\1/p' "$root/docker-compose.yml")" ;;
    airflow) image="apache/airflow:$version-python3.11" ;;
  esac
  get "$image" && continue
  made="$image"
  [ "$stage" != airflow ] || made=mlpipelines-stand-ins-airflow
  printf 'services:\n  %s:\n    build: {context: ., target: %s, labels: {%s: "%s"}}\n    image: %s\n' \
    "$stage" "$stage" "$label" "$recipe" "$made" >"$work/build.yml"
  make "$stage"
  [ "$stage" != airflow ] || install_airflow "$image"
done
