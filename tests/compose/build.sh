#!/usr/bin/env bash
# Leave the programs for the test of docker-compose.yml in the user's cache, and print the folder:
# versitygw (the S3 server), and docker-compose where the Docker client has no `docker compose`.
#
# They are built from Go modules, once per version: four minutes of two cores. A build that is interrupted leaves nothing.
#
# Usage: build.sh [--only-look]    With --only-look nothing is built: the exit status says whether they are there.
set -euo pipefail

compose=2.40.0
versitygw=1.8.0
caches="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests"
cache="$caches/compose-$compose-versitygw-$versitygw"

has_compose() { docker compose version >/dev/null 2>&1; } # the machine's own is used where there is one

is_complete() { [ -x "$cache/versitygw" ] && { [ -x "$cache/docker-compose" ] || has_compose; }; }

build() { # name of the program, module, version, package, name of the variable that holds the version
  echo "compose: building $1" >&2
  mkdir "$work/$1"
  cd "$work/$1"
  printf 'module parts\n\ngo 1.24.0\n\nrequire %s v%s\n' "$2" "$3" >go.mod
  printf '//go:build tools\n\npackage tools\n\nimport _ "%s"\n' "$4" >tools.go # so that `tidy` keeps it
  go mod tidy
  go build -trimpath -ldflags="-s -w -X $5=v$3" -o "$work/made/$1" "$4"
}

if is_complete; then
  echo "$cache"
  exit 0
fi
if [ "${1:-}" = --only-look ]; then
  echo "compose: no programs in $cache; $0 builds them" >&2
  exit 1
fi
if ! command -v go >/dev/null; then
  echo "compose: Go 1.24 or newer (or 1.21, which fetches it) is needed, and 'go' is not on the PATH" >&2
  exit 1
fi

mkdir -p "$caches"
exec 9>"$cache.lock"
flock 9 # another session may be building the same
if is_complete; then
  echo "$cache"
  exit 0
fi
rm -rf "$cache".new.* # of builds that were killed; no other is running
work="$(mktemp -d "$cache.new.XXXXXX")" # beside the cache, so that the last step is a rename
trap 'rm -rf "$work"' EXIT
mkdir "$work/made"
export CGO_ENABLED=0

build versitygw github.com/versity/versitygw "$versitygw" github.com/versity/versitygw/cmd/versitygw main.Version
module=github.com/docker/compose/v2
has_compose || build docker-compose "$module" "$compose" "$module/cmd" "$module/internal.Version"

rm -rf "$cache"
mv "$work/made" "$cache"
echo "$cache"
