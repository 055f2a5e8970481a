#!/usr/bin/env bash
# Install what minisgl needs into .venv of this folder, and start nothing: for images (docs/deploy/Dockerfile).
# MINISGL_GPU=1 installs for NVIDIA GPUs where none is seen, as while an image is built; 0 for CPUs where one is.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" || exit 1 # started by sh
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

ensure_env_here
