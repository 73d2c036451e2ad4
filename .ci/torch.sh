#!/usr/bin/env bash
# Leave a Python with PyTorch (without CUDA, with gloo) in the user's cache, where tests look for it: once per release of
# the distribution.
#
# PyTorch's wheels cannot be imported without gigabytes of CUDA. The distribution's packages can: they are unpacked in a
# folder of their own, with all libraries but the C library, so that they work in a container of the same release too.
# Nothing is installed. 240 MB are fetched, in half a minute.
set -euo pipefail

command -v apt-get >/dev/null || {
  echo "torch: no apt-get" >&2
  exit 0
}
recipe=1 # raise it when what is put into the folder changes
. /etc/os-release
cache="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests/torch-$ID-${VERSION_ID:-0}-v$recipe"
[ -x "$cache/python" ] && exit 0

mkdir -p "$(dirname "$cache")"
work="$(mktemp -d "$cache.XXXXXX")"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/debs/partial" "$work/root"
# As if nothing were installed: what this machine has by chance, the container has not.
apt-get -qq -y --no-install-recommends --download-only -o Debug::NoLocking=1 -o Dir::State::status=/dev/null \
  -o APT::Sandbox::User=root -o Dir::Cache::archives="$work/debs" install python3-torch >/dev/null
for package in "$work"/debs/*.deb; do
  case "$(basename "$package")" in
    libc6_* | libc-bin_* | python3_* | python3-minimal_* | python3.*_* | libpython3* | perl* | libllvm* | libgl1-mesa-dri_* | *-data_* | \
      libtorch-test_* | fonts-* | iso-codes_*) continue ;;
  esac
  dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/root" --wildcards --exclude='*/share/*' '*/lib/*' 2>/dev/null || true
done
rm -r "$work/debs"
cat >"$work/python" <<'WRAPPER'
#!/bin/sh
# The distribution's Python with the packages of this folder.
here="$(dirname "$(readlink -f "$0")")/root"
for folder in "$here"/usr/lib "$here"/usr/lib/*-linux-gnu "$here"/usr/lib/*-linux-gnu/blas "$here"/usr/lib/*-linux-gnu/lapack "$here"/lib/*-linux-gnu; do
  LD_LIBRARY_PATH="$LD_LIBRARY_PATH${LD_LIBRARY_PATH:+:}$folder"
done
export LD_LIBRARY_PATH PYTHONPATH="$here/usr/lib/python3/dist-packages${PYTHONPATH:+:$PYTHONPATH}"
exec /usr/bin/python3 "$@"
WRAPPER
chmod 755 "$work" "$work/python"
"$work/python" -c 'import torch.distributed as d; assert d.is_available()'
mv -T "$work" "$cache"
