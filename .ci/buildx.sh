#!/usr/bin/env bash
# Leave `docker buildx` working: the one that is there, else one built from its Go module and linked into the user's
# Docker plugins. Kept in the user's cache: it takes a minute and a half of two cores, once per version.
set -euo pipefail
version=0.29.1

if docker buildx version >/dev/null 2>&1; then
  echo "buildx: $(docker buildx version)"
  exit 0
fi

cache="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests/buildx-$version"
if [ ! -x "$cache/docker-buildx" ]; then
  command -v go >/dev/null || {
    echo "buildx: no Go to build it with" >&2
    exit 1
  }
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  cd "$work" # a module of our own: its own one can't be installed by name, as it replaces others
  cat >go.mod <<MODULE
module buildx

go 1.24.0

require github.com/docker/buildx v$version
MODULE
  cat >tools.go <<'GO'
//go:build tools

package buildx

import _ "github.com/docker/buildx/cmd/buildx"
GO
  go mod tidy
  CGO_ENABLED=0 go build -trimpath -ldflags="-s -w -X github.com/docker/buildx/version.Version=v$version" \
    -o "$work/made" github.com/docker/buildx/cmd/buildx
  mkdir -p "$cache"
  mv "$work/made" "$cache/docker-buildx"
fi
plugins="${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins"
mkdir -p "$plugins"
ln -sf "$cache/docker-buildx" "$plugins/docker-buildx"
echo "buildx: $(docker buildx version)"
