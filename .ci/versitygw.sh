#!/usr/bin/env bash
# Leave versitygw, an S3 server, in the user's cache, where tests look for it, and print its path:
# built by Go, in a minute, once per version.
set -euo pipefail

version=1.8.0
cache="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests/versitygw-$version"

if [ -x "$cache/versitygw" ]; then
  echo "$cache/versitygw"
  exit 0
fi
command -v go >/dev/null || PATH="$PATH:/usr/local/go/bin" # where Go's own installer puts it
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
CGO_ENABLED=0 GOBIN="$work" go install "github.com/versity/versitygw/cmd/versitygw@v$version"
mkdir -p "$cache"
mv "$work/versitygw" "$cache/versitygw"
echo "$cache/versitygw"
