#!/usr/bin/env bash
# Install what is needed (the first time) and serve with N replicas behind a router, on this host; ^C ends all of it.
#
#   scripts/cluster.sh 3                                       the embedded model, at http://127.0.0.1:8000/v1
#   scripts/cluster.sh 2 --port 9000 -- --model Qwen/Qwen3-8B  flags of `minisgl cluster --help`; behind --, of every replica
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" || exit 1 # started by sh
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

ensure_env_here
ensure_router
export PATH="$venv/bin:$PATH" # ninja, for kernels that are compiled at the first start
run_minisgl cluster "$@"
