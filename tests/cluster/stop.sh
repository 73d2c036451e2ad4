#!/usr/bin/env bash
# End a cluster that start.sh started, wholly or half, and remove its folder.
#
# Usage: stop.sh [--keep-logs] STATE
set -euo pipefail

keep_logs=""
if [ "${1:-}" = --keep-logs ]; then
  keep_logs=yes
  shift
fi
state="$(cd "${1:?the state folder of a cluster}" && pwd)"

is_ours() { # a process id: the number may be another process's by now
  { tr '\0' ' ' <"/proc/$1/cmdline" | grep -qF "node.sh run $state "; } 2>/dev/null
}

end_node() { # the first process of the namespaces; what else is in them, and they themselves, end with it
  local unshare first
  [ -e "$state/pid" ] || return 0
  unshare="$(cat "$state/pid")"
  is_ours "$unshare" || return 0
  first="$(cat "/proc/$unshare/task/$unshare/children" 2>/dev/null || true)"
  # shellcheck disable=SC2086 # a list
  kill -KILL ${first:-$unshare} 2>/dev/null || true
  for _ in $(seq 100); do
    is_ours "$unshare" || return 0
    sleep 0.1
  done
  echo "cluster: process $unshare does not end" >&2
  return 1
}

remove_cgroups() { # they outlive their processes
  local hierarchy cgroup
  [ -e "$state/number" ] || return 0
  cgroup="mlpipelines-tests-$(cat "$state/number")"
  [ ! -e "/sys/class/net/mlpk${cgroup##*-}" ] || return 0 # another cluster has the number by now
  for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ -d "$hierarchy/$cgroup" ] || continue
    for _ in $(seq 20); do # the kernel needs a moment to see them empty
      find "$hierarchy/$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
      [ -d "$hierarchy/$cgroup" ] || break
      sleep 0.1
    done
  done
}

end_node
for _ in $(seq 50); do # the kernel takes the network apart behind our back
  [ -e "$state/number" ] && [ -e "/sys/class/net/mlpk$(cat "$state/number")" ] || break
  sleep 0.1
done
remove_cgroups
if [ -n "$keep_logs" ]; then
  rm -f "$state/pid" "$state/number"
  find "$state" -mindepth 1 -maxdepth 1 ! -name log -exec rm -rf {} +
else
  rm -rf "$state"
fi
