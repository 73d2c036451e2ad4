#!/usr/bin/env bash
# Leave buildkitd and buildctl in the user's cache, where tests look for them, and print their directory: built from their
# Go module, of the version that .ci/buildx.sh has as well, once per version.
set -euo pipefail

version=0.25.0
cache="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests/buildkit-$version"

if [ -x "$cache/buildkitd" ]; then
  echo "$cache"
  exit 0
fi
command -v go >/dev/null || PATH="$PATH:/usr/local/go/bin" # where Go's own installer puts it
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >go.mod <<MODULE
module buildkit

go 1.24.0

require github.com/moby/buildkit v$version
MODULE
cat >tools.go <<'GO'
//go:build tools

package buildkit

import (
	_ "github.com/moby/buildkit/cmd/buildctl"
	_ "github.com/moby/buildkit/cmd/buildkitd"
)
GO
go mod tidy
mkdir made
CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -o made/ github.com/moby/buildkit/cmd/buildctl github.com/moby/buildkit/cmd/buildkitd
mkdir -p "$cache"
mv made/buildctl made/buildkitd "$cache/"
echo "$cache"
