#!/usr/bin/env bash
# Chat in the terminal with a running server (scripts/launch.sh).  Flags: scripts/chat.sh --help
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" || exit 1 # started by sh
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

if [ ! -x "${here%/*}/.venv/bin/python" ]; then
    echo "minisgl: there is no .venv here: run scripts/launch.sh first" >&2
    exit 1
fi
source "$here/env.sh"
run_minisgl chat "$@"
