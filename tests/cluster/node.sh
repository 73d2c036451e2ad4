#!/usr/bin/env bash
# The node itself: start.sh runs this, first to write its files, then as the first process of its namespaces.
#
# Usage: node.sh configure STATE BIN
#        node.sh run STATE BIN [FILE]    ends once no process holds a lock on FILE, if one is named
set -euo pipefail
verb=$1 state=$2 bin=$3 users=${4:-}

configure() {
  mkdir -p "$state"/{etcd,pki,cni,addresses,log,pod-logs,containerd,kubelet,run}
  umask 077
  openssl genrsa -out "$state/pki/sa.key" 2048 2>/dev/null
  openssl rsa -in "$state/pki/sa.key" -pubout -out "$state/pki/sa.pub" 2>/dev/null
  openssl rand -hex 16 >"$state/token"
  echo "$(cat "$state/token"),admin,admin,system:masters" >"$state/pki/tokens.csv"
}

write_files() { # what names the node's address
  cat >"$state/kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters:
- {name: test, cluster: {server: "https://$node:6443", certificate-authority: "$state/pki/apiserver.crt"}}
users:
- {name: admin, user: {token: "$(cat "$state/token")"}}
contexts:
- {name: test, context: {cluster: test, user: admin, namespace: default}}
current-context: test
YAML
  chmod 600 "$state/kubeconfig"
  cat >"$state/cni/10-bridge.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "pods", "isGateway": false, "ipMasq": false,
   "ipam": {"type": "host-local", "dataDir": "$state/addresses", "routes": [{"dst": "0.0.0.0/0"}],
            "ranges": [[{"subnet": "$pods", "gateway": "$node"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
  # Where root lacks CAP_SYS_RESOURCE, runc can't give a sandbox a negative OOM score and dies of it.
  cat >"$state/containerd.toml" <<TOML
version = 2
root = "$state/containerd"
state = "/run/containerd"
[grpc]
address = "$state/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/mlpipelines-pause:1"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "$state/registries"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "$state/cni"
TOML
  cat >"$state/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup
failSwapOn: false
containerRuntimeEndpoint: "unix://$state/containerd.sock"
resolvConf: ""
clusterDNS: [$node]
clusterDomain: cluster.local
address: $node
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}, x509: {clientCAFile: ""}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: 200Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
maxPods: 200
YAML
  cat >"$state/Corefile" <<COREFILE
.:53 {
  bind $node
  errors
  kubernetes cluster.local {
    kubeconfig $state/kubeconfig
  }
}
COREFILE
}

set_up_network() { # one bridge that the pods hang on; its address is the node's, so pods reach the API server
  ip link set lo up
  ip address add "198.19.$number.2/30" dev eth0
  ip link set eth0 up
  ip route add default via "198.19.$number.1"
  # Without an address of its own, a bridge takes the lowest of its ports', another one whenever a pod comes or goes: the
  # other pods then send to nobody for half a minute.
  ip link add pods address 02:00:c6:12:00:01 type bridge
  ip address add "$node/24" dev pods
  ip link set pods up
  echo 1 >/proc/sys/net/ipv4/ip_forward
}

set_up_mounts() { # folders whose names are fixed in the programs: another kubelet would clear ours away in them
  local folder
  mkdir -p /var/lib/cni /var/lib/kubelet /var/log
  mount -t tmpfs tmpfs /run
  mkdir -p /run/lock /run/netns
  for folder in /var/lib/cni /var/lib/kubelet /var/log; do
    mkdir -p "$state/run$folder"
    mount --bind "$state/run$folder" "$folder"
  done
  mount --make-rshared / # among the node's own processes; pods may ask for mounts that propagate
}

set_up_cgroups() { # of our own: a kubelet kills whatever it finds in its cgroups and does not know
  local hierarchy hierarchies=(/sys/fs/cgroup/*) # cgroup v1
  [ ! -e /sys/fs/cgroup/cgroup.controllers ] || hierarchies=(/sys/fs/cgroup)
  for hierarchy in "${hierarchies[@]}"; do
    mkdir -p "$hierarchy/$cgroup"
  done
}

start() { # name, then a command; while the cluster starts, the end of one part is the end of all
  local name=$1
  shift
  {
    "$@" >"$state/log/$name.log" 2>&1 </dev/null || true
    echo "$name has ended: $(tail -n 3 "$state/log/$name.log")"
    [ -e "$state/is-up" ] || kill -TERM 1
  } &
}

wait_for_api() { # a path
  local token
  token="$(cat "$state/token")"
  until curl --noproxy '*' -skf --max-time 5 -o /dev/null -H "Authorization: Bearer $token" "https://$node:6443$1"; do
    sleep 0.1
  done
}

start_control_plane() {
  start etcd etcd --data-dir "$state/etcd" --unsafe-no-fsync
  start kube-apiserver "$bin/kubernetes" kube-apiserver \
    --etcd-servers=http://127.0.0.1:2379 --bind-address="$node" --advertise-address="$node" --secure-port=6443 \
    --cert-dir="$state/pki" --service-cluster-ip-range="$services" --allow-privileged=true \
    --authorization-mode=Node,RBAC --token-auth-file="$state/pki/tokens.csv" \
    --service-account-issuer=https://kubernetes.default.svc \
    --service-account-signing-key-file="$state/pki/sa.key" --service-account-key-file="$state/pki/sa.pub" \
    --kubelet-preferred-address-types=InternalIP # else logs and exec look the node's name up
  wait_for_api /readyz
  start kube-controller-manager "$bin/kubernetes" kube-controller-manager --kubeconfig="$state/kubeconfig" \
    --service-account-private-key-file="$state/pki/sa.key" --root-ca-file="$state/pki/apiserver.crt" \
    --use-service-account-credentials=true --leader-elect=false
  start kube-scheduler "$bin/kubernetes" kube-scheduler --kubeconfig="$state/kubeconfig" --leader-elect=false
}

start_node_agents() {
  start kubelet "$bin/kubernetes" kubelet --config="$state/kubelet.yaml" --kubeconfig="$state/kubeconfig" \
    --root-dir="$state/kubelet" --hostname-override=node-1 --node-ip="$node"
  # Pods on one bridge answer each other past the node's address translation, unless they see the node as the caller.
  start kube-proxy "$bin/kubernetes" kube-proxy --kubeconfig="$state/kubeconfig" --hostname-override=node-1 \
    --proxy-mode=iptables --masquerade-all --conntrack-max-per-core=0
  start coredns "$bin/coredns" -conf "$state/Corefile"
}

is_used() { [ -z "$users" ] || ! flock --nonblock "$users" true; }

if [ "$verb" = configure ]; then
  configure
  exit 0
fi

until [ -e "$state/number" ]; do sleep 0.05; done # start.sh has connected us
number="$(cat "$state/number")"
node="198.18.$number.1" pods="198.18.$number.0/24" services=10.96.0.0/16
cgroup="mlpipelines-tests-$number"
write_files
set_up_network
set_up_mounts
set_up_cgroups
trap 'exit 1' TERM # the first process of its namespaces gets only the signals that it asks for
start containerd containerd --config "$state/containerd.toml"
start_control_plane
start_node_agents
# The end of the first process is the end of all.
while is_used; do sleep 2; done
