#!/usr/bin/env bash
# Leave a Docker daemon answering: the one that is there, else one started here, by hand.
#
# Environment: DOCKER_DAEMON_LOG and DOCKER_DAEMON_PIDFILE say where the daemon started here puts its log and its pid.
set -euo pipefail

if docker info >/dev/null 2>&1; then
  echo "docker: a daemon answers"
  exit 0
fi

if ! command -v dockerd >/dev/null 2>&1; then
  echo "docker: installing docker.io"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io iptables >/dev/null
fi

state="${TMPDIR:-/tmp}"
log="${DOCKER_DAEMON_LOG:-$state/mlpipelines-dockerd.log}"
pidfile="${DOCKER_DAEMON_PIDFILE:-$state/mlpipelines-dockerd.pid}"

# A session of its own: the daemon outlives the shell that called this script.
setsid nohup dockerd >"$log" 2>&1 </dev/null &
echo $! >"$pidfile"

for _ in $(seq 120); do
  if docker info >/dev/null 2>&1; then
    echo "docker: daemon started, pid $(cat "$pidfile"), log $log"
    exit 0
  fi
  if ! kill -0 "$(cat "$pidfile")" 2>/dev/null; then
    break
  fi
  sleep 0.5
done

echo "docker: the daemon does not answer; the end of $log:" >&2
tail -n 30 "$log" >&2
exit 1
