#!/usr/bin/env bash
# Leave Azurite, Microsoft's emulator of Azure Storage, in the user's cache, where tests look for it: once per version.
set -euo pipefail

version=3.37.0
cache="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests/azurite-$version"

[ -x "$cache/node_modules/.bin/azurite-blob" ] && exit 0
mkdir -p "$(dirname "$cache")"
work="$(mktemp -d "$cache.XXXXXX")"
trap 'rm -rf "$work"' EXIT
npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$work" "azurite@$version"
mv -T "$work" "$cache"
