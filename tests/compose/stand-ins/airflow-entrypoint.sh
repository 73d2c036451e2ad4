#!/usr/bin/env bash
# What docker-compose.yml relies on of the official image's entrypoint.
set -euo pipefail
umask 0002
case "${1:-}" in
  bash | python | airflow) exec "$@" ;;
  *) exec airflow "$@" ;;
esac
