#!/usr/bin/env bash
# Leave docker-compose in the user's cache where the Docker client has no `docker compose`, and print the folder.
#
# It is built from its Go module, once per version: two minutes of two cores. A build that is interrupted leaves nothing.
#
# Usage: build.sh [--only-look]    With --only-look nothing is built: the exit status says whether it is there.
set -euo pipefail

compose=2.40.0
caches="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests"
cache="$caches/compose-$compose"

has_compose() { docker compose version >/dev/null 2>&1; } # the machine's own is used where there is one

is_complete() { [ -x "$cache/docker-compose" ] || has_compose; }

if is_complete; then
  echo "$cache"
  exit 0
fi
if [ "${1:-}" = --only-look ]; then
  echo "compose: no program in $cache; $0 builds it" >&2
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
module=github.com/docker/compose/v2
mkdir "$work/module" "$work/made"
cd "$work/module"
printf 'module parts\n\ngo 1.24.0\n\nrequire %s v%s\n' "$module" "$compose" >go.mod
printf '//go:build tools\n\npackage tools\n\nimport _ "%s/cmd"\n' "$module" >tools.go # so that `tidy` keeps it
go mod tidy
CGO_ENABLED=0 go build -trimpath -ldflags="-s -w -X $module/internal.Version=v$compose" \
  -o "$work/made/docker-compose" "$module/cmd"

rm -rf "$cache"
mv "$work/made" "$cache"
echo "$cache"
