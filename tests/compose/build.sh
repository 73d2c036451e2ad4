#!/usr/bin/env bash
# Leave docker-compose, for machines whose Docker client has no `docker compose`, in the user's cache, and print its path.
#
# It is built from Go modules, once per version: three minutes of two cores. A build that is interrupted leaves nothing.
set -euo pipefail

version=2.40.0
module=github.com/docker/compose/v2
caches="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests"
cache="$caches/compose-$version"

if [ -x "$cache/docker-compose" ]; then
  echo "$cache/docker-compose"
  exit 0
fi
command -v go >/dev/null || PATH="$PATH:/usr/local/go/bin" # where Go's own installer puts it
if ! command -v go >/dev/null; then
  echo "compose: Go 1.24 or newer (or 1.21, which fetches it) is needed to build it, and 'go' is not on the PATH" >&2
  exit 1
fi

mkdir -p "$caches"
exec 9>"$cache.lock"
flock 9 # another session may be building the same
if [ -x "$cache/docker-compose" ]; then
  echo "$cache/docker-compose"
  exit 0
fi
rm -rf "$cache".new.* # of builds that were killed; no other is running
work="$(mktemp -d "$cache.new.XXXXXX")" # beside the cache, so that the last step is a rename
trap 'rm -rf "$work"' EXIT
mkdir "$work/made"
cd "$work"
printf 'module compose\n\ngo 1.24.0\n\nrequire %s v%s\n' "$module" "$version" >go.mod
printf '//go:build tools\n\npackage tools\n\nimport _ "%s/cmd"\n' "$module" >tools.go # so that `tidy` keeps it
echo "compose: building docker-compose $version" >&2
go mod tidy
CGO_ENABLED=0 go build -trimpath -ldflags="-s -w -X $module/internal.Version=v$version" -o made/docker-compose "$module/cmd"
rm -rf "$cache"
mv made "$cache"
echo "$cache/docker-compose"
