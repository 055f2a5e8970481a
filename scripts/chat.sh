#!/usr/bin/env bash
# Chat in the terminal with a running server (scripts/launch.sh).  Flags: scripts/chat.sh --help
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

if [ ! -x "$root/.venv/bin/python" ]; then
    echo "minisgl: there is no .venv in $root: run scripts/launch.sh first" >&2
    exit 1
fi
# Not `-m`: it would import from the folder where the user is, in which file names of the flags are to be found.
exec "$root/.venv/bin/python" -c 'import sys
sys.path[0] = sys.argv.pop(1)
from minisgl.__main__ import main
sys.exit(main(sys.argv[1:]))' "$root" chat "$@"
