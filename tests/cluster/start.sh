#!/usr/bin/env bash
# Start a Kubernetes of one node on this machine and print the path of its kubeconfig.
#
# The node lives in network, process and mount namespaces of its own, as in a container: several clusters run beside each
# other, with the same ports inside, and when the first process of a node is killed, all of the node is gone: processes,
# mounts, bridge, firewall rules.
#
# Usage: start.sh [--while-locked FILE] STATE IMAGE...
#   STATE      a folder that is new or empty; stop.sh STATE ends the cluster and removes it
#   IMAGE      copied in from the Docker daemon; in pods, python:3.11-slim is docker.io/library/python:3.11-slim
#   --while-locked FILE   the cluster ends by itself once no process holds a lock (flock) on FILE
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

users=""
if [ "${1:-}" = --while-locked ]; then
  users=$2
  shift 2
fi
if [ $# = 0 ]; then
  sed -n 's/^# \{0,1\}//; 2,13p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
mkdir -p "$1"
state="$(cd "$1" && pwd)"
shift
images=("$@")

fail() {
  echo "cluster: $*" >&2
  exit 1
}

check_machine() {
  local program
  [ "$(id -u)" = 0 ] || fail "only root can start a kubelet"
  for program in etcd containerd ctr runc iptables ip openssl curl docker unshare /usr/lib/cni/bridge; do
    command -v "$program" >/dev/null || fail "no program $program; see $here/README.md for the packages"
  done
  [ ! -e "$state/pid" ] || fail "$state has a cluster already; $here/stop.sh $state ends it"
  # The kernel's limit for the path of a socket is 107.
  [ "${#state}" -le 80 ] || fail "the path of the state folder is too long for sockets in it: $state"
}

wait_for() { # seconds, what, then a command
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    kill -0 "$unshare" 2>/dev/null || fail "the node ended while it started: $(tail -n 5 "$state/log/node.log")"
    [ "$SECONDS" -lt "$end" ] || fail "waited in vain for $what; the logs are in $state/log"
    sleep 0.1
  done
}

start_node() {
  bash "$here/node.sh" configure "$state" "$bin" # fails here, in the open, where something is wrong with the folder
  setsid unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private \
    bash "$here/node.sh" run "$state" "$bin" "$users" >"$state/log/node.log" 2>&1 </dev/null &
  unshare=$!
  echo "$unshare" >"$state/pid"
}

is_apart() { [ "$(readlink "/proc/$unshare/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }

# Each cluster has a number of its own; the name of its cable to the machine, which only one can have, holds it.
# Its addresses come from the range that is set aside for tests of networks (RFC 2544).
connect_node() {
  local number
  wait_for 10 "the namespaces" is_apart
  for number in $(seq 0 63); do
    if ip link add "mlpk$number" type veth peer name eth0 netns "$unshare" 2>/dev/null; then
      ip address add "198.19.$number.1/30" dev "mlpk$number"
      ip link set "mlpk$number" up
      ip route add "198.18.$number.0/24" via "198.19.$number.2"
      node="198.18.$number.1"
      echo "$number" >"$state/number.new"
      mv "$state/number.new" "$state/number" # node.sh waits for it
      return
    fi
  done
  fail "no free network device mlpk0 to mlpk63 (see: ip link), or no right to make one"
}

copy_images() { # a stopped node has none, so they are copied at each start
  local image pause=localhost/mlpipelines-pause:1
  docker image inspect "$pause" >/dev/null 2>&1 ||
    tar -C "$bin" -c pause | docker import --change 'ENTRYPOINT ["/pause"]' - "$pause" >/dev/null
  docker save "$pause" "${images[@]}" |
    ctr --address "$state/containerd.sock" --namespace k8s.io images import - >/dev/null
}

call() { # the API server, past any proxy
  curl --noproxy '*' -skf --max-time 10 -H "Authorization: Bearer $(cat "$state/token")" "$@"
}

api() { call "https://$node:6443$1"; }

node_is_ready() { api /api/v1/nodes/node-1 | tr -d ' \n' | grep -q '"reason":"KubeletReady"'; }

# A node with two GPUs, as far as the scheduler can tell. The kubelet leaves it in place for as long as it runs.
give_gpus() {
  local count='{"nvidia.com/gpu": "2"}'
  call -o /dev/null -X PATCH -H "Content-Type: application/merge-patch+json" \
    -d "{\"status\": {\"capacity\": $count, \"allocatable\": $count}}" \
    "https://$node:6443/api/v1/nodes/node-1/status"
}

check_machine
bin="$("$here/build.sh" --only-look)"
for image in "${images[@]}"; do
  docker image inspect "$image" >/dev/null 2>&1 || fail "the Docker daemon has no image $image to copy"
done

unshare=""
trap '[ -z "$unshare" ] || "$here/stop.sh" --keep-logs "$state" >&2' EXIT # until it is up
start_node
connect_node
wait_for 30 containerd test -S "$state/containerd.sock"
wait_for 30 containerd ctr --address "$state/containerd.sock" version
copy_images
wait_for 60 "the API server" api /readyz
wait_for 60 "the kubelet" api /api/v1/nodes/node-1
give_gpus
wait_for 60 "the node" node_is_ready
wait_for 60 "the default service account" api /api/v1/namespaces/default/serviceaccounts/default
touch "$state/is-up"
trap - EXIT
echo "$state/kubeconfig"
