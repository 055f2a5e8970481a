#!/usr/bin/env bash
# Install what is needed (the first time) and serve an OpenAI-compatible API on 127.0.0.1:8000.
#
#   scripts/launch.sh                                        the embedded SmolLM2-135M-Instruct, no GPU and no download needed
#   scripts/launch.sh --model Qwen/Qwen3-14B --tp 2          any flag of `python -m minisgl --help`
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

extras=()
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    extras+=(gpu-lean)
fi
ensure_env ${extras[@]+"${extras[@]}"}
export PATH="$venv/bin:$PATH" # ninja, for kernels that are compiled at the first start
exec "$venv/bin/python" -m minisgl "$@"
