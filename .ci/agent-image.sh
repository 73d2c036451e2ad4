#!/usr/bin/env bash
# Leave the image mlpipelines-agent:test on the Docker daemon, built by images/agent/Dockerfile from what lies here.
#
# Only the driver of S3 goes into it, and only what the Dockerfile copies is sent to the daemon. Without a change
# nothing is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

image="${1:-mlpipelines-agent:test}"
base=python:3.11-slim # the one that tests have
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

tar --exclude=__pycache__ --sort=name -c constraints.txt images/agent/Dockerfile airflow_mlpipelines/*.py \
  airflow_mlpipelines/agent airflow_mlpipelines/storage |
  DOCKER_BUILDKIT=0 docker build --quiet --build-arg "BASE=$base" --build-arg "DRIVERS=s3fs obstore" \
    --file images/agent/Dockerfile --tag "$image" - >"$log" 2>&1 || {
  tail -n 30 "$log" >&2
  exit 1
}
echo "image: $image is there"
