#!/usr/bin/env bash
# Leave the binaries of the cluster for tests in the user's cache, and print the folder:
# kubernetes (all of its components in one), coredns and pause.
#
# They are built from Go modules, once per version: six minutes of two cores, or half a minute where Go has them in its
# own cache. A build that is interrupted leaves nothing behind.
#
# Usage: build.sh [--only-look]    With --only-look nothing is built: the exit status says whether all of them are there.
set -euo pipefail

# Of the minors tried, 1.33.0 to 1.33.4 verify against Go's checksum database; 1.33.5 and 1.33.6 do not.
version=1.33.4
coredns_version=1.12.1
minor="${version#1.}" # Kubernetes 1.33.4 is made of libraries v0.33.4
programs=(kubernetes coredns pause)

sources="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/sources"
caches="${XDG_CACHE_HOME:-$HOME/.cache}/mlpipelines-tests"
cache="$caches/kubernetes-$version"

is_complete() {
  local program
  for program in "${programs[@]}"; do
    [ -x "$cache/$program" ] || return 1
  done
}

write_kubernetes_module() { # k8s.io/kubernetes wants the libraries of its own minor, and says so by folders we lack
  local library
  printf 'module kubernetes\n\ngo 1.24.0\n\n'
  printf 'require (\n\tk8s.io/component-base v0.%s\n\tk8s.io/kubernetes v%s\n)\n\n' "$minor" "$version"
  printf 'replace (\n'
  for library in api apiextensions-apiserver apimachinery apiserver cli-runtime client-go cloud-provider \
    cluster-bootstrap code-generator component-base component-helpers controller-manager cri-api cri-client \
    csi-translation-lib dynamic-resource-allocation endpointslice externaljwt kms kube-aggregator \
    kube-controller-manager kube-proxy kube-scheduler kubectl kubelet metrics mount-utils pod-security-admission \
    sample-apiserver; do
    printf '\tk8s.io/%s => k8s.io/%s v0.%s\n' "$library" "$library" "$minor"
  done
  printf ')\n'
}

build() { # name of a program, then flags of the linker
  local program=$1
  shift
  echo "cluster: building $program" >&2
  cd "$work/$program"
  go mod tidy
  go build -trimpath -ldflags="-s -w $*" -o "$work/made/$program" .
}

if is_complete; then
  echo "$cache"
  exit 0
fi
if [ "${1:-}" = --only-look ]; then
  echo "cluster: no binaries in $cache; $0 builds them" >&2
  exit 1
fi
if ! command -v go >/dev/null; then
  echo "cluster: Go 1.24 or newer (or 1.21, which fetches it) is needed to build Kubernetes, and 'go' is not on the PATH" >&2
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
cp -r "$sources/." "$work/"
mkdir "$work/made"
export CGO_ENABLED=0

write_kubernetes_module >"$work/kubernetes/go.mod"
printf 'module coredns\n\ngo 1.24.0\n\nrequire github.com/coredns/coredns v%s\n' "$coredns_version" >"$work/coredns/go.mod"
printf 'module pause\n\ngo 1.24.0\n' >"$work/pause/go.mod"

build pause
build coredns
named=k8s.io/component-base/version
build kubernetes "-X $named.gitVersion=v$version -X $named.gitMajor=1 -X $named.gitMinor=${minor%%.*}"

rm -rf "$cache" # an incomplete one, of an older form
mv "$work/made" "$cache"
echo "$cache"
