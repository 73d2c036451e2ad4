#!/usr/bin/env bash
# Leave the image python:3.11-slim on the Docker daemon, where tests look for it.
#
# Where no registry can be reached, a stand-in of the same name is made from the distribution's own packages. Its root
# filesystem is kept as a tarball in the user's cache, so that the next run imports it within seconds.
#
# The stand-in trusts whatever certificates this machine trusts, so that pip works in it behind the same proxies.
set -euo pipefail

image="${1:-python:3.11-slim}"
suite=bookworm # its python3 is 3.11
recipe=1       # raise it when what is put into the tarball changes
cache="${XDG_CACHE_HOME:-$HOME/.cache}/airflow-mlpipelines"
tarball="$cache/python-3.11-$suite-$(dpkg --print-architecture)-v$recipe.tar"

if docker image inspect "$image" >/dev/null 2>&1; then
  echo "image: $image is there"
  exit 0
fi

if [ ! -f "$tarball" ]; then
  if ! command -v debootstrap >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
  fi
  mkdir -p "$cache"
  root="$(mktemp -d)"
  trap 'rm -rf "$root"' EXIT
  echo "image: making $image from $suite packages"
  debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates "$suite" "$root" >"$cache/debootstrap.log" 2>&1 || {
    tail -n 30 "$cache/debootstrap.log" >&2
    exit 1
  }
  ln -sf python3 "$root/usr/bin/python"
  ln -sf pip3 "$root/usr/bin/pip"
  rm -f "$root/usr/lib/python3.11/EXTERNALLY-MANAGED" # as in the image that it stands for
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  certificates="${SSL_CERT_FILE:-${PIP_CERT:-}}"
  if [ -n "$certificates" ] && [ -f "$certificates" ]; then
    install -m 0644 "$certificates" "$root/etc/ssl/certs/ca-certificates.crt"
  fi
  tar -C "$root" -cf "$tarball.new.$$" .
  mv "$tarball.new.$$" "$tarball"
fi

docker import \
  --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
  --change 'ENV LANG=C.UTF-8' \
  --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
  --change 'CMD ["python3"]' \
  "$tarball" "$image" >/dev/null
echo "image: $image is there now"
