#!/usr/bin/env bash
# Chat in the terminal with a running server (scripts/launch.sh).  Flags: scripts/chat.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    echo "minisgl: there is no .venv here: run scripts/launch.sh first" >&2
    exit 1
fi
exec .venv/bin/python -m minisgl chat "$@"
