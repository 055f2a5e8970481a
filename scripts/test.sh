#!/usr/bin/env bash
# Set up the environment and pass the tests: lint, types, test suite.  Arguments go to pytest (scripts/test.sh -k radix).
# Without any, the files are shared out among as many processes as there are cores, four at most.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" || exit 1 # started by sh
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

ensure_env dev
cd "$root"
echo "== ruff" && "$venv/bin/ruff" check . && "$venv/bin/ruff" format --check .
echo "== mypy" && "$venv/bin/python" -m mypy
unset PYTHONSAFEPATH # tests run as they do by hand
cores=$(nproc)
if [ $# -eq 0 ] && [ "$cores" -gt 1 ]; then
    set -- -n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder
fi
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-20000} # threads that wait for each other do not keep the cores from other processes
echo "== pytest" && exec "$venv/bin/python" -m pytest "$@"
